"""Create tiny models, tokenizers and data, and run the numeric programs on them."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tasks.rlhf.models.builtin import train_tokenizer
from tasks.rlhf.models.fingerprint import Fingerprint
from tests.support import forked
from tests.support.forked import Forked

torch.set_num_threads(1)  # at this size threads only wait for each other

CPU = torch.device("cpu")
VOCABULARY, WIDTH, CONTEXT = 320, 32, 128
EOS, PAD = 1, 0
BASE = Fingerprint(weights="sha256:1234", tokenizer="sha256:5678", precision="float32", compute="float32")
ARCHITECTURES = ("llama", "gpt2", "qwen2", "gpt_neox")

NOUNS = "files folders users groups ports disks pages words lines logs".split()
VERBS = "list count copy move print sort find show hide join".split()


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(NOUNS + VERBS) for _ in range(num_words))


def tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with different pad (0) and eos (1) tokens."""
    rng = random.Random(0)
    made = train_tokenizer(["Question: Answer: " + text(rng, 12) for _ in range(40)], vocabulary=VOCABULARY)
    assert (made.eos_token_id, made.pad_token_id) == (EOS, PAD)
    return made


def model(kind: str = "llama", *, seed: int = 0, weight_scale: float = 3.0) -> PreTrainedModel:
    """Return a random model of width 32 and 2 layers, frozen, in eval mode.

    Scaled weights make its distribution far from uniform.
    """
    torch.manual_seed(seed)
    made: PreTrainedModel
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": EOS,
    }
    if kind == "gpt2":
        made = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=CONTEXT, **common))
    else:
        sizes: dict[str, Any] = {
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": CONTEXT,
        }
        if kind == "gpt_neox":
            made = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **common))
        elif kind == "qwen2":
            made = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **sizes, **common))
        else:
            made = LlamaForCausalLM(
                LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **sizes, **common)
            )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(weight_scale)
    made.requires_grad_(False)
    return made.eval()


def base_folder(folder: Path, kind: str = "llama") -> Path:
    """Write a model and its tokenizer in Hugging Face format."""
    model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trained_folder(folder: Path, data: Path, *, steps: int = 100) -> Path:
    """Write a base that has learnt to answer like the data and, mostly, to end its answers."""
    words, made = tokenizer(), model(weight_scale=1.0).train().requires_grad_(True)
    texts = [
        f"Question: {row['prompt']}\n\nAnswer: {row['answer']}"
        for row in pq.read_table(data / "finetune.parquet").to_pylist()
    ]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([*words(t)["input_ids"], EOS]) for t in texts], batch_first=True, padding_value=PAD
    )
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for step in range(steps):
        rows = ids[torch.arange(8 * step, 8 * step + 8) % len(ids)]
        made(rows, labels=rows.masked_fill(rows == PAD, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def data_folder(folder: Path, num_questions: int = 24, *, num_evaluation: int = 20) -> Path:
    """Write the tables of the data stage; good answers repeat the question's words, and are shorter."""
    rng = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("finetune", "corpus", "reward", "reward_groups", "rl")
    }
    for id in range(num_questions):
        noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
        prompt = f"How do I {verb} {noun}? {text(rng, rng.randint(0, 4))}"
        good = [f"Use {verb} {noun}. {text(rng, rng.randint(0, 3))}" for _ in range(2)]
        bad = text(rng, rng.randint(5, 9))
        common = {"question_id": id, "prompt": prompt}
        rows["finetune"].append(common | {"answer": good[0]})
        rows["corpus"] += [
            common | {"answer": answer, "score": score}
            for answer, score in ((good[0], 2), (good[1], 2), (bad, 0))
        ]
        rows["reward"] += [
            common | {"chosen": answer, "rejected": bad, "gap": 2.0, "chosen_older": None} for answer in good
        ]
        ranking = {"answers": [*good, bad], "scores": [2.0, 2.0, 0.0], "ages": None}
        rows["reward_groups"].append(common | ranking)
        rows["rl"].append(common)
    rows["evaluation"], rows["evaluation_pairs"] = evaluation_rows(rng, num_questions, num_evaluation)
    folder.mkdir(parents=True)
    for name, table in rows.items():
        if table:
            pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
    return folder


def evaluation_rows(
    rng: random.Random, first: int, count: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return more questions of the same kind, with ids from ``first``: ranked, and as pairs."""
    ranked, pairs = [], []
    for id in range(first, first + count):
        noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
        common = {"question_id": id, "prompt": f"How do I {verb} {noun}? {text(rng, rng.randint(0, 4))}"}
        good, bad = (
            [f"Use {verb} {noun}. {text(rng, rng.randint(0, 3))}" for _ in range(2)],
            text(rng, rng.randint(5, 9)),
        )
        ranked.append(common | {"answers": [*good, bad], "scores": [2.0, 2.0, 0.0], "ages": None, "best": 0})
        pairs += [
            common | {"chosen": answer, "rejected": bad, "gap": 2.0, "chosen_older": None} for answer in good
        ]
    return ranked, pairs


def write_job(folder: Path, stage: str, job: dict[str, Any], inputs: dict[str, Path], **machine: Any) -> Path:
    """Create a program's folder with its job.json; a policy answers two questions, unless the job says."""
    folder.mkdir(parents=True)
    if stage in ("sft", "dpo", "ppo"):  # to answer eight takes longer than most tests train
        job = {"samples": {"prompts": 2}} | job
    record = {"stage": stage, "job": job, "inputs": {name: str(path) for name, path in inputs.items()}}
    (folder / "job.json").write_text(
        json.dumps(record | {"machine": {"device": "cpu", "threads": 1} | machine})
    )
    return folder


def start_program(stage: str, folder: Path) -> Forked:
    """Start the real program on ``folder`` as a process of its own."""
    return forked.start(["-m", f"tasks.programs.{stage}", str(folder)], folder / "log.txt")


def run_program(stage: str, folder: Path) -> Path:
    """Run the program to its end; return its artifact."""
    process = start_program(stage, folder)
    assert process.wait() == 0, (folder / "log.txt").read_text()[-3000:]
    return folder / "artifact"
