"""Test exports: the same log-probabilities and greedy answers in other programs, and TRL's formats."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks.config.commands.usage import ExportDataJob, ExportJob, PolicyFiles, Sampling
from tasks.config.sections.models import Text
from tasks.programs.runtime.program import Run
from tasks.programs.usage.answer import Answer
from tasks.programs.usage.chat_templates import Message
from tasks.programs.usage.export import export
from tasks.programs.usage.export_data import ROWS, export_data, read_rows, supervised, write_parquet
from tasks.programs.usage.loaded_policies import LoadedPolicy, load_policies
from tasks.reporting.model_card.model_card import ADAPTER_LIMIT
from tasks.rlhf.models import loading
from tasks.system.errors import InputError
from tests.programs.usage.tiny_policies import adapter, data_tables, policy
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

QUESTION = [{"role": "user", "content": "How do I list files?"}]


def exported(folder: Path, one: PolicyFiles, form: str = "merged", **more: Any) -> Path:
    """Return the folder that the program writes."""
    inputs = more.pop("inputs", {})
    job = ExportJob(policy=one, form=form, **more)  # type: ignore[arg-type]
    run = Run(tiny.write_job(folder, "export", job.model_dump(mode="json"), inputs))
    export(job, run)
    return run.artifact


def own_log_probs(one: LoadedPolicy, ids: Tensor) -> Tensor:
    with one.active() as model, torch.no_grad():
        found: Tensor = model(ids).logits.log_softmax(dim=-1)
    return found


def log_probs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits.log_softmax(dim=-1)
    return found


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_merged_export_computes_what_the_policy_does(kind: str, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base", kind)
    one = policy(base, adapter(tmp_path / "ppo", base), temperature=0.7)
    folder = exported(tmp_path / "run", one)
    [ours] = load_policies((one,), tiny.CPU)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    ids = torch.arange(2, 98).reshape(3, 32)
    difference = (log_probs(model, ids) - own_log_probs(ours, ids)).abs().max()
    assert difference < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (log_probs(plain, ids) - own_log_probs(ours, ids)).abs().max() > 0.1

    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**asked, do_sample=False)[0, asked["input_ids"].shape[1] :]
    answer = Answer(ours, [Message(**turn) for turn in QUESTION], Sampling(temperature=0), seed=0)  # type: ignore[typeddict-item]
    answer.extend(60)
    assert answer.prompt == asked["input_ids"][0].tolist()
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer.text
    assert answer.text

    sampling = GenerationConfig.from_pretrained(folder)
    assert (sampling.do_sample, sampling.temperature, sampling.top_k) == (True, 0.7, 0)
    assert (sampling.max_new_tokens, sampling.eos_token_id, sampling.pad_token_id) == (12, tiny.EOS, tiny.PAD)


def test_the_card_of_a_merged_policy_says_that_it_is_one_model(tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    card = tmp_path / "card.md"
    text = "---\nlibrary_name: {}\nlicense: mit\n---\n\n# PPO\n\n- It is small.\n{}\nEnd.\n"
    card.write_text(text.format("peft", f"- {ADAPTER_LIMIT}\n"))
    one = policy(base, adapter(tmp_path / "ppo", base))
    merged = exported(tmp_path / "merged", one, inputs={"card": card})
    assert (merged / "README.md").read_text() == text.format("transformers", "")
    alone = exported(tmp_path / "alone", one, "adapter", base_name=str(base), inputs={"card": card})
    assert (alone / "README.md").read_text() == card.read_text()


def test_a_whole_model_is_exported_as_it_is(tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    folder = exported(tmp_path / "run", policy(base, template=None))
    ids = torch.arange(2, 34)[None]
    expected = log_probs(AutoModelForCausalLM.from_pretrained(base), ids)
    assert torch.equal(log_probs(AutoModelForCausalLM.from_pretrained(folder), ids), expected)
    assert "Question: " in (folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_an_export_keeps_the_type_of_the_weights(stored: torch.dtype, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.model().to(stored).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    folder = exported(tmp_path / "run", policy(base, adapter(tmp_path / "ppo", base)))
    assert loading.folder_dtype(folder) == stored
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == stored


def test_an_adapter_alone_loads_on_the_base_that_it_names(tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    one = policy(base, adapter(tmp_path / "ppo", base))
    card = tmp_path / "card.md"
    card.write_text("# Card\n")
    folder = exported(tmp_path / "run", one, "adapter", base_name=str(base), inputs={"card": card})
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "base.json",
    }  # fmt: skip
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), folder)
    ids = torch.arange(2, 98).reshape(3, 32)
    [ours] = load_policies((one,), tiny.CPU)
    assert (log_probs(model, ids) - own_log_probs(ours, ids)).abs().max() < 1e-5


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    bases = [tiny.base_folder(tmp_path / kind, kind) for kind in ("llama", "gpt2")]
    with pytest.raises(InputError, match="does not belong to this base"):
        exported(tmp_path / "run", policy(bases[1], adapter(tmp_path / "ppo", bases[0])))


def test_bottlenecks_are_refused(tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    (tmp_path / "dpo" / "bottleneck").mkdir(parents=True)
    with pytest.raises(InputError, match="dpo has bottlenecks, which no other program can load"):
        exported(tmp_path / "run", policy(base, tmp_path / "dpo"))


CONVERTER = """
import sys, pathlib, helper
model, option, file = sys.argv[1:4]
assert option == "--outfile" and (pathlib.Path(model) / "chat_template.jinja").exists()
pathlib.Path(file).write_bytes(b"GGUF")
"""


@pytest.mark.parametrize(
    ("helper", "reason"),
    [
        ("", ""),
        ("raise NotImplementedError('pre-tokenizer')", r"cannot convert this model \(NotImplementedError"),
        ("import no_such_package", r"lacks a package .*No module named 'no_such_package'"),
    ],
)
def test_gguf_is_written_by_the_converter(
    helper: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as programs have it: the converter needs its own folder
    base, checkout = tiny.base_folder(tmp_path / "base"), tmp_path / "llama.cpp"
    checkout.mkdir()
    (checkout / "helper.py").write_text(helper)
    (checkout / "convert.py").write_text(CONVERTER)
    options = {"converter": str(checkout / "convert.py")}
    if reason:
        with pytest.raises(InputError, match=reason):
            exported(tmp_path / "run", policy(base), "gguf", **options)
        return
    folder = exported(tmp_path / "run", policy(base), "gguf", **options)
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]


def data_exported(folder: Path, data: Path, template: str, form: str) -> Path:
    job = ExportDataJob(text=Text(template=template), form=form, about="a run")  # type: ignore[arg-type]
    run = Run(tiny.write_job(folder, "export_data", job.model_dump(mode="json"), {"data": data}))
    export_data(job, run)
    return run.artifact


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tables of the data stage with all their columns."""
    return data_tables(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("template", ["question-answer", "human-assistant", "chat"])
def test_data_is_exported_as_trl_takes_it(template: str, form: str, data: Path, tmp_path: Path) -> None:
    folder = data_exported(tmp_path / "run", data, template, form)
    prompt, this, that = {
        "question-answer": ("Question: How? \n\nAnswer:", " This.", " That."),
        "human-assistant": ("\n\nHuman: How? \n\nAssistant:", " This.", " That."),
        "chat": (
            [{"content": "How? ", "role": "user"}],
            [{"content": "This.", "role": "assistant"}],
            [{"content": "That.", "role": "assistant"}],
        ),
    }[template]
    cache = str(tmp_path / "cache")

    def rows(kind: str, split: str) -> Any:
        return load_dataset(str(folder), kind, split=split, cache_dir=cache)

    for split in ("train", "test"):
        [row] = rows("sft", split)
        assert (row["prompt"], row["completion"], row["score"]) == (prompt, this, 2.0)
        assert row["answer_url"] == ("answer_url" if split == "train" else "answer_url 1")
        [row] = rows("preference", split)
        assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, this, that)
        assert (row["question_licence"], row["rejected_author"]) == ("question_licence", "rejected_author")
    [row] = rows("prompts", "train")
    assert row["prompt"] == prompt


def test_a_table_of_several_batches_keeps_its_order(data: Path, tmp_path: Path) -> None:
    row = pq.read_table(data / "finetune.parquet").to_pylist()[0]
    count = 2 * ROWS + 3
    table = pa.Table.from_pylist([row | {"question_id": number} for number in range(count)])
    pq.write_table(table, tmp_path / "finetune.parquet", row_group_size=1000)
    batches = read_rows(tmp_path / "finetune.parquet", supervised, "question-answer")
    assert write_parquet(batches, tmp_path / "out.parquet") == count
    written = pq.read_table(tmp_path / "out.parquet")
    assert written["question_id"].to_pylist() == [*range(count)]
