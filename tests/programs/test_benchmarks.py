"""Test the program benchmarks: perplexity, benchmarks by lm-eval, RewardBench 2, and resuming."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import BenchmarksJob, DpoJob, ReferenceJob, RewardJob
from tasks.config.sections.benchmarks import Benchmarks
from tasks.programs import benchmarks, dpo, reference, reward
from tasks.programs.runtime import benchmark_tasks, policies
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.paths import ROOT

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 24}
LORA = {"rank": 2, "alpha": 8.0}
COMMON = {"seed": 0, "text": TEXT}
TRAINING = {"lora": LORA, "max_steps": 4, "epochs": 10, "learning_rate": 2e-2}

Inputs = dict[str, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Return a base, an SFT model, a reward model and a DPO policy, which differ, and their data."""
    root = tmp_path_factory.mktemp("models")
    data = tiny.data_folder(root / "data", 24)
    base = tiny.base_folder(root / "base")
    tuned = tiny.base_folder(root / "tuned")
    tiny.model(seed=1).save_pretrained(tuned)
    found = {"data": data, "base": base, "model": tuned}
    run = Run(tiny.write_job(root / "reward", "reward", COMMON | {"reward": TRAINING}, found))
    reward.train(RewardJob.model_validate(run.record), run)
    logged = Run(tiny.write_job(root / "reference", "reference", {"text": TEXT}, found))
    reference.compute(ReferenceJob.model_validate(logged.record), logged)
    job = COMMON | {"dpo": TRAINING | {"beta": 0.1}}
    trained = Run(tiny.write_job(root / "dpo", "dpo", job, found | {"reference": logged.artifact}))
    dpo.train(DpoJob.model_validate(trained.record), trained)
    return found | {"reward": run.artifact, "dpo": trained.artifact}


def of(inputs: Inputs, *names: str, **more: Path) -> Inputs:
    return {name: inputs[name] for name in ("data", "base", "model", *names)} | more


def write_run(folder: Path, inputs: Inputs, **settings: Any) -> Run:
    return Run(tiny.write_job(folder, "benchmarks", {"text": TEXT, "benchmarks": settings}, inputs))


def measure(folder: Path, inputs: Inputs, **settings: Any) -> Run:
    run = write_run(folder, inputs, **settings)
    benchmarks.measure(BenchmarksJob.model_validate(run.record), run)
    return run


def metrics(run: Run) -> dict[str, Any]:
    return json.loads((run.artifact / "summary.json").read_text())["metrics"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_likelihood(model: PreTrainedModel, before: list[int], after: list[int]) -> float:
    """Return the log-likelihood of tokens after others, one text at a time and without any batch."""
    logits: Tensor = model(torch.tensor([before + after])).logits[0].double()
    log_probs = logits.log_softmax(dim=1)
    return sum(log_probs[len(before) + place - 1, id].item() for place, id in enumerate(after))


def answer_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Return prompt and answer as the plain template has them."""
    before = tokenizer(f"Question: {question}\n\nAnswer:", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"Question: {question}\n\nAnswer: {answer}", add_special_tokens=False)["input_ids"]
    return whole[: len(before)], whole[len(before) :]


def test_the_perplexity_is_that_of_the_best_answers_computed_one_by_one(
    inputs: Inputs, tmp_path: Path
) -> None:
    long = {"text": {"max_prompt_tokens": 100, "max_answer_tokens": 100}}  # nothing is cut
    run = Run(tiny.write_job(tmp_path / "run", "benchmarks", long | {"benchmarks": {}}, of(inputs, "dpo")))
    benchmarks.measure(BenchmarksJob.model_validate(run.record), run)
    found, words = metrics(run), tiny.tokenizer()
    rows = pq.read_table(inputs["data"] / "evaluation.parquet").to_pylist()
    answers = [row["answers"][row["best"]].strip() for row in rows]
    pairs = [answer_ids(words, row["prompt"], answer) for row, answer in zip(rows, answers, strict=True)]
    tokens = sum(len(after) for _, after in pairs)
    per_token = {}
    loaded = policies.load_tuned(run, None, tiny.CPU).active | policies.load_base(run, None, tiny.CPU).active
    for name, active in loaded.items():
        with active() as model, torch.no_grad():
            nats = -sum(log_likelihood(model, *pair) for pair in pairs)
        per_token[name] = nats / tokens
        assert found[f"perplexity.{name}"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        bits = nats / math.log(2) / sum(len(answer.encode()) for answer in answers)
        assert found[f"bits_per_byte.{name}"]["value"] == pytest.approx(bits, rel=1e-5)
    assert len({round(value, 3) for value in per_token.values()}) == 3  # three different models
    for ours, theirs in (("dpo", "sft"), ("dpo", "base"), ("sft", "base")):
        increase = 100 * (math.exp(per_token[ours] - per_token[theirs]) - 1)
        estimate = found[f"tax.perplexity.{ours}_vs_{theirs}"]
        assert estimate["value"] == pytest.approx(increase, rel=1e-3)
        assert estimate["low"] < estimate["value"] < estimate["high"]
        assert estimate["n"] == len(rows)
    losses = pq.read_table(run.artifact / "perplexity.parquet").to_pydict()
    assert sum(losses["tokens"]) == tokens
    assert -log_likelihood(AutoModelForCausalLM.from_pretrained(inputs["base"]), *pairs[3]) == pytest.approx(
        losses["base"][3], rel=1e-5
    )


def test_padding_and_batches_change_nothing(inputs: Inputs, tmp_path: Path) -> None:
    runs = [measure(tmp_path / f"{size}", of(inputs, "dpo"), batch_size=size) for size in (1, 7, 64)]
    tables = [pq.read_table(run.artifact / "perplexity.parquet").to_pydict() for run in runs]
    for name in ("base", "sft", "dpo"):
        first, *others = (torch.tensor(table[name]) for table in tables)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)


def test_an_answer_that_is_cut_counts_what_is_left_of_it(inputs: Inputs, tmp_path: Path) -> None:
    job = {"text": TEXT | {"max_answer_tokens": 4}, "benchmarks": {"num_texts": 5}}
    run = Run(tiny.write_job(tmp_path / "run", "benchmarks", job, of(inputs)))
    benchmarks.measure(BenchmarksJob.model_validate(run.record), run)
    table = pq.read_table(run.artifact / "perplexity.parquet").to_pydict()
    assert table["tokens"] == [4] * 5
    answers = {
        row["question_id"]: row["answers"][row["best"]]
        for row in pq.read_table(inputs["data"] / "evaluation.parquet").to_pylist()
    }
    words = tiny.tokenizer()
    for id, size in zip(table["question_id"], table["bytes"], strict=True):
        ids = words(f" {answers[id]}", add_special_tokens=False)["input_ids"][:4]
        assert size == len(words.decode(ids).strip().encode())
    assert metrics(run)["benchmarks.answers_cut"] == 1


def test_the_same_model_twice_has_no_tax(inputs: Inputs, tmp_path: Path) -> None:
    run = measure(tmp_path / "run", {**of(inputs), "model": inputs["base"]})
    assert metrics(run)["tax.perplexity.sft_vs_base"] == {"value": 0, "low": 0, "high": 0, "n": 20}


KILL_AFTER_TWO = """
import os, signal, sys
from tasks.config.jobs import BenchmarksJob
from tasks.programs import benchmarks
from tasks.programs.runtime.program import main
from tasks.rlhf.training import checkpoints
save, saved = checkpoints.save, []
def save_and_die(*arguments):
    save(*arguments)
    saved.append(1)
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save = save_and_die
main(benchmarks.measure, BenchmarksJob)
"""


def test_a_killed_program_goes_on_with_what_is_not_finished(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(tmp_path / "whole", of(inputs, "dpo"))
    run = write_run(tmp_path / "killed", of(inputs, "dpo"))
    killed = subprocess.run([sys.executable, "-c", KILL_AFTER_TWO, str(run.directory)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (run.artifact / "summary.json").exists()
    computed = []
    losses = benchmarks.measure_losses
    monkeypatch.setattr(
        benchmarks, "measure_losses", lambda model, *more: computed.append(model) or losses(model, *more)
    )
    monkeypatch.setattr(policies, "load_base", lambda *_: pytest.fail("the base was finished"))
    again = Run(run.directory)
    benchmarks.measure(BenchmarksJob.model_validate(again.record), again)
    assert computed == ["dpo"]
    files = {path.name: path.read_bytes() for path in whole.artifact.iterdir()}
    assert {path.name: path.read_bytes() for path in again.artifact.iterdir()} == files
    assert "metrics.jsonl" in files


def test_an_empty_evaluation_split_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    data = shutil.copytree(inputs["data"], tmp_path / "data")
    table = pq.read_table(data / "evaluation.parquet")
    pq.write_table(table.slice(0, 0), data / "evaluation.parquet")
    with pytest.raises(InputError, match="The evaluation split has no questions"):
        measure(tmp_path / "run", {**of(inputs), "data": data})


def test_a_model_that_yields_no_numbers_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    broken = shutil.copytree(inputs["base"], tmp_path / "broken")
    model = tiny.model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(broken)
    with pytest.raises(InputError, match="loss of held-out answers under base is nan"):
        measure(tmp_path / "run", {**of(inputs), "base": broken})


# RewardBench 2

REWARD_ROWS = [
    {"id": "0", "prompt": "How do I list files?", "chosen": ["Use list files."], "subset": "Math"},
    {"id": "1", "prompt": "How do I copy files?", "chosen": ["Use copy files."], "subset": "Math"},
    {"id": "2", "prompt": "How do I sort words?", "chosen": ["Use sort words."], "subset": "Precise IF"},
    {"id": "ref:7", "prompt": "How do I move files?", "chosen": ["Use move files."], "subset": "Ties"},
    {"id": "tied:7", "prompt": "How?", "chosen": ["Use move.", "Use copy."], "subset": "Ties"},
]


def test_the_reward_model_is_scored_on_reward_bench(inputs: Inputs, tmp_path: Path) -> None:
    rejected = ["ports disks pages", "log log log words", "users"]
    rows = [row | {"rejected": rejected} for row in REWARD_ROWS]
    file = write_rows(tmp_path / "rb.jsonl", rows)
    run = measure(tmp_path / "run", of(inputs, "reward", "dpo", reward_bench=file))
    found, table = metrics(run), pq.read_table(run.artifact / "reward_bench.parquet").to_pylist()
    assert [(len(row["chosen"]), len(row["rejected"])) for row in table] == [(1, 3)] * 4 + [(2, 3)]
    right = [float(max(row["chosen"]) > max(row["rejected"])) for row in table]
    assert found["reward_bench.Math"]["value"] == (right[0] + right[1]) / 2
    assert found["reward_bench.Precise_IF"]["value"] == right[2]
    subsets = [found[f"reward_bench.{name}"]["value"] for name in ("Math", "Precise_IF", "Ties")]
    assert found["reward_bench.total"] == pytest.approx(sum(subsets) / 3)
    # the scores are those of the reward model, computed alone
    scorer = policies.load_tuned(run, None, tiny.CPU).scorer
    assert scorer is not None
    (member,) = scorer.members
    before, after = answer_ids(tiny.tokenizer(), rows[1]["prompt"], rejected[1])
    with member.active() as model, torch.no_grad():
        hidden = model.model(torch.tensor([[*before, *after, tiny.EOS]])).last_hidden_state[0, -1]
        score = (member.head(hidden[None]).item() - member.mean) / member.std
    assert table[1]["rejected"][1] == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_without_a_file_there_is_no_reward_bench(inputs: Inputs, tmp_path: Path) -> None:
    run = measure(tmp_path / "run", of(inputs))
    assert not [name for name in metrics(run) if name.startswith("reward_bench")]
    assert not (run.artifact / "reward_bench.parquet").exists()


# Benchmarks


def questions(count: int) -> list[dict[str, Any]]:
    """Return multiple-choice questions with choices of unlike lengths."""
    rows = []
    for number in range(count):
        noun, verb = tiny.NOUNS[number % 10], tiny.VERBS[number // 10 % 10]
        choices = [f"Use {verb} {noun}.", noun, f"{verb} {verb} {noun} log lines", "ports"][: 2 + number % 3]
        rows.append(
            {"query": f"How do I {verb} {noun}? {number}", "choices": choices, "gold": number % len(choices)}
        )
    return rows


def continuations(count: int) -> list[dict[str, str]]:
    return [
        {"context": f"Use {tiny.VERBS[i % 10]} {i}", "continuation": tiny.NOUNS[i % 10]} for i in range(count)
    ]


def test_documents_and_examples_are_drawn_once_and_never_both(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "quiz.jsonl", questions(60))
    settings = Benchmarks(num_fewshot=(0, 2, 5), num_examples=12, max_documents=30)
    tasks = benchmark_tasks.read_tasks({"data": tmp_path, "benchmark_quiz": file}, settings)
    assert [task.label for task in tasks] == ["quiz", "quiz.2shot", "quiz.5shot"]
    assert [len(task.examples) for task in tasks] == [0, 12, 12]
    lines = [[document.line for document in task.documents] for task in tasks]
    assert lines[0] == lines[1] == lines[2] == sorted(lines[0])
    assert len(lines[0]) == 30
    assert not set(lines[0]) & {document.line for document in tasks[1].examples}
    assert lines[0] != list(range(1, 31))
    (alone,) = benchmark_tasks.read_tasks({"benchmark_quiz": file}, Benchmarks())
    assert [document.line for document in alone.documents] == list(range(1, 61))


def test_a_file_that_is_too_short_for_examples_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "quiz.jsonl", questions(12))
    settings = Benchmarks(num_fewshot=(2,), num_examples=12)
    with pytest.raises(InputError, match=r"quiz has 12 questions, of which benchmarks.num_examples keeps 12"):
        benchmark_tasks.read_tasks({"benchmark_quiz": file}, settings)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test if lm-eval, which is in the extra benchmarks, is not installed."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # the program sets them
        monkeypatch.setenv(name, "1")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'alignflow[benchmarks]'")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_accuracies_are_those_of_log_likelihoods_computed_one_by_one(
    inputs: Inputs, tmp_path: Path, lm_eval: None
) -> None:
    quiz, rows, lambada = questions(40), continuations(15), tmp_path / "lambada.jsonl"
    files = {
        "benchmark_quiz": write_rows(tmp_path / "quiz.jsonl", quiz),
        "benchmark_lambada": write_rows(lambada, rows),
    }
    run = measure(tmp_path / "run", of(inputs, "dpo", **files), num_fewshot=[0, 2], num_examples=3)
    found, words = metrics(run), tiny.tokenizer()
    table = pq.read_table(run.artifact / "documents.parquet").to_pylist()
    loaded = policies.load_tuned(run, None, tiny.CPU).active | policies.load_base(run, None, tiny.CPU).active
    for name, active in loaded.items():
        of_model = [row for row in table if row["model"] == name and row["num_fewshot"] == 0]
        answered = [row for row in of_model if row["benchmark"] == "quiz"]
        assert len(answered) == 37
        with active() as model, torch.no_grad():
            for row in answered:
                document = quiz[row["line"] - 1]
                before = words(document["query"])["input_ids"]
                after = [
                    words(f"{document['query']} {choice}")["input_ids"][len(before) :]
                    for choice in document["choices"]
                ]
                expected = torch.tensor([log_likelihood(model, before, ids) for ids in after])
                torch.testing.assert_close(
                    torch.tensor(row["log_likelihoods"]), expected, rtol=1e-4, atol=1e-4
                )
                sizes = torch.tensor([len(choice) for choice in document["choices"]])
                assert row["acc"] == float(expected.argmax() == document["gold"])
                assert row["acc_norm"] == float((expected / sizes).argmax() == document["gold"])
                assert row["gold"] == document["gold"]
            (first, *_) = [row for row in of_model if row["benchmark"] == "lambada"]
            document = rows[first["line"] - 1]
            before = words(document["context"])["input_ids"]
            after = words(f"{document['context']} {document['continuation']}")["input_ids"][len(before) :]
            assert first["log_likelihoods"] == pytest.approx([log_likelihood(model, before, after)], rel=1e-4)
        accuracy = sum(row["acc"] for row in answered) / len(answered)
        assert found[f"benchmark.quiz.{name}"]["value"] == pytest.approx(accuracy)
    assert {len({row["line"] for row in table if row["num_fewshot"] == shots}) for shots in (0, 2)} == {37}
    likelihoods = {row["num_fewshot"]: row["log_likelihoods"] for row in table if row["benchmark"] == "quiz"}
    assert likelihoods[0] != likelihoods[2]  # the last document's under the last model: it has read examples
    assert found["benchmark.quiz.2shot.dpo"]["n"] == 37
    # paired: the tax is the mean of the differences, and McNemar's test has the pairs that differ
    by_line = {
        (row["model"], row["line"]): row["acc"]
        for row in table
        if row["benchmark"] == "quiz" and not row["num_fewshot"]
    }
    lines = {line for _, line in by_line}
    lost = [by_line["base", line] - by_line["dpo", line] for line in lines]
    assert found["tax.quiz.dpo_vs_base"]["value"] == pytest.approx(100 * sum(lost) / len(lost))
    losses, gains = sum(one > 0 for one in lost), sum(one < 0 for one in lost)
    tail = sum(math.comb(losses + gains, k) for k in range(min(losses, gains) + 1))
    assert found["mcnemar.quiz.dpo_vs_base"] == pytest.approx(min(1, 2 * tail / 2 ** (losses + gains)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_documents_longer_than_the_context_are_warned_of(
    inputs: Inputs, tmp_path: Path, lm_eval: None
) -> None:
    long = [
        row | {"query": "list files " * (100 * (number % 2) + 1)} for number, row in enumerate(questions(8))
    ]
    file = write_rows(tmp_path / "quiz.jsonl", long)
    run = measure(tmp_path / "run", of(inputs, benchmark_quiz=file))
    (warning,) = json.loads((run.artifact / "summary.json").read_text())["warnings"]
    assert warning.startswith("4 of 8 documents of quiz are longer than the model's context")
    file = write_rows(tmp_path / "quiz.jsonl", [long[0] | {"choices": ["a", "list files " * 100]}])
    with pytest.raises(InputError, match=r"has an answer of .* tokens, and the model reads 128"):
        measure(tmp_path / "again", of(inputs, benchmark_quiz=file))
