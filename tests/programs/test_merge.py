"""Test the merge program: it makes an ordinary model with the adapter's outputs, in every precision of the
base.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from tasks.config.jobs import DpoJob, MergeJob, ReferenceJob, RewardJob, SftJob
from tasks.programs import dpo, merge, reference, reward, sft
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.chat_families import CHATML

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning"
)  # GPT-2 keeps its matrices the other way round
TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}
LORA = {"rank": 4, "alpha": 16.0}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_folder(tmp_path_factory.mktemp("merge") / "data", 40)


def tuned(folder: Path, data: Path, base: Path, *, precision: str | None = None, **changed: Any) -> Path:
    """Return an artifact of SFT whose adapter changes the logits a lot."""
    settings = {
        "lora": LORA,
        "max_steps": 20,
        "epochs": 10,
        "block_tokens": 96,
        "learning_rate": 1e-2,
    } | changed
    text = settings.pop("text", TEXT)
    job = {"seed": 0, "text": text, "weights": {"base": precision}, "sft": settings}
    run = Run(tiny.write_job(folder, "sft", job, {"data": data, "base": base}))
    sft.train(SftJob.model_validate(run.record), run)
    return run.artifact


def scored(folder: Path, data: Path, base: Path, **changed: Any) -> Path:
    """Return an artifact of the reward stage."""
    text = changed.pop("text", TEXT)
    job = {"seed": 0, "text": text, "reward": {"lora": LORA, "max_steps": 8, "epochs": 10} | changed}
    run = Run(tiny.write_job(folder, "reward", job, {"data": data, "model": base}))
    reward.train(RewardJob.model_validate(run.record), run)
    return run.artifact


def merged(
    folder: Path,
    artifact: Path,
    base: Path,
    *,
    precision: str | None = None,
    dtype: str | None = None,
    template: str = "question-answer",
) -> tuple[Path, dict[str, float]]:
    """Return the merged model's folder and what merging changed."""
    job = {"text": {"template": template}, "weights": {"base": precision}, "merge": {"dtype": dtype}}
    run = Run(tiny.write_job(folder, "merge", job, {"base": base, "adapter": artifact}))
    merge.merge(MergeJob.model_validate(run.record), run)
    return run.artifact / "model", json.loads((run.artifact / "summary.json").read_text())["metrics"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_merged_model_says_what_its_adapter_said(kind: str, data: Path, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base", kind)
    artifact = tuned(tmp_path / "sft", data, base)
    place, metrics = merged(tmp_path / "merge", artifact, base)
    plain = logits(AutoModelForCausalLM.from_pretrained(place))
    adapted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), artifact / "adapter")
    )
    torch.testing.assert_close(plain, adapted, atol=1e-4, rtol=1e-4)
    assert (plain - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert metrics["merge.drift_max"] < 1e-3
    assert (metrics["merge.top1_agreement"], metrics["merge.answers_reproduced"]) == (1.0, 1.0)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_merged_reward_model_scores_as_its_adapter_did(kind: str, data: Path, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base", kind)
    artifact = scored(tmp_path / "reward", data, base)
    place, metrics = merged(tmp_path / "merge", artifact, base)
    apart = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.testing.assert_close(
        logits(AutoModelForSequenceClassification.from_pretrained(place)),
        logits(PeftModel.from_pretrained(apart, artifact / "adapter")),
        atol=1e-4,
        rtol=1e-4,
    )
    assert metrics["merge.reward_drift_max"] < 1e-4
    assert metrics["merge.order_reproduced"] == 1.0


@pytest.mark.parametrize("spare", ["<pad>", None])
def test_a_merged_reward_model_reads_batches_where_the_end_token_pads(
    spare: str | None, data: Path, tmp_path: Path
) -> None:
    base = tiny.base_folder(tmp_path / "base")
    words = tiny.tokenizer()
    words.pad_token = words.eos_token
    words.unk_token = spare
    words.save_pretrained(base)
    place, _ = merged(tmp_path / "merge", scored(tmp_path / "reward", data, base), base)
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(place).eval(),
        AutoTokenizer.from_pretrained(place),
    )
    texts = [
        text + words.eos_token
        for text in (
            "Question: list files\n\nAnswer: find",
            "Question: copy\n\nAnswer: move lines and sort words",
        )
    ]
    with torch.no_grad():
        at_end = torch.stack(
            [
                model.score(model.model(**words(text, return_tensors="pt")).last_hidden_state[0, -1])
                for text in texts
            ]
        )
    if spare is None:  # rather no batches than wrong ones
        assert words.pad_token is None
        with pytest.raises(ValueError, match="batch sizes > 1"):
            model(torch.tensor([[5, 6, 1], [7, 8, 1]]))
        return
    together = model(**words(texts, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(together.detach(), at_end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_an_adapter_of_a_quantised_base_is_merged_into_what_it_was_trained_on(
    precision: str, data: Path, tmp_path: Path
) -> None:
    base = tiny.base_folder(tmp_path / "base")
    artifact = tuned(tmp_path / "sft", data, base, precision=precision)
    _, metrics = merged(tmp_path / "merge", artifact, base, precision=precision)
    assert metrics["merge.drift_max"] < 1e-3
    with pytest.raises(
        InputError,
        match=(
            rf"it was trained on a base in {precision} and this one is in float32 \(set weights.base to "
            rf"{precision}\)"
        ),
    ):
        merged(tmp_path / "other", artifact, base)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("bfloat16", 1e-4, 1.0), ("float16", 1e-6, 0.1), (None, 0.0, 1e-3)]
)
def test_merging_into_less_precise_weights_is_measured(
    dtype: str | None, least: float, most: float, data: Path, tmp_path: Path
) -> None:
    base = tiny.base_folder(tmp_path / "base")
    place, metrics = merged(tmp_path / "merge", tuned(tmp_path / "sft", data, base), base, dtype=dtype)
    assert least <= metrics["merge.drift_max"] < most
    assert AutoModelForCausalLM.from_pretrained(place, dtype="auto").dtype == getattr(
        torch, dtype or "float32"
    )


def test_a_model_that_was_trained_whole_is_taken_over(data: Path, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    artifact = tuned(tmp_path / "sft", data, base, tune="full", learning_rate=1e-3)
    place, metrics = merged(tmp_path / "merge", artifact, base)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(place)),
        logits(AutoModelForCausalLM.from_pretrained(artifact / "model")),
    )
    assert metrics["merge.drift_max"] == 0


def test_what_cannot_be_one_model_is_refused(data: Path, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    ensemble = scored(tmp_path / "reward", data, base, members=2, max_steps=1)
    with pytest.raises(InputError, match="An ensemble cannot be merged into one model"):
        merged(tmp_path / "one", ensemble, base)
    inputs = {"data": data, "model": base}
    known = Run(tiny.write_job(tmp_path / "reference", "reference", {"text": TEXT}, inputs))
    reference.compute(ReferenceJob.model_validate(known.record), known)
    job = {"seed": 0, "text": TEXT, "dpo": {"tune": "bottleneck", "bottleneck": {"width": 4}, "max_steps": 1}}
    run = Run(tiny.write_job(tmp_path / "dpo", "dpo", job, inputs | {"reference": known.artifact}))
    dpo.train(DpoJob.model_validate(run.record), run)
    with pytest.raises(InputError, match="Bottlenecks cannot be merged"):
        merged(tmp_path / "two", run.artifact, base)


def test_another_base_is_refused(data: Path, tmp_path: Path) -> None:
    base, other = tiny.base_folder(tmp_path / "base"), tmp_path / "other"
    artifact = tuned(tmp_path / "sft", data, base, max_steps=1)
    tiny.model(seed=1).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    with pytest.raises(InputError, match="its base's weights were sha256:"):
        merged(tmp_path / "merge", artifact, other)


@pytest.mark.parametrize(
    ("known", "ends", "stops"),
    [
        (1, (1,), 1),
        (1, (5, 1), [1, 5]),
        ([1, 9], (5, 1), [1, 9, 5]),
        (None, (5, 1), [5, 1]),
        (None, (1,), 1),
        ([1], (1,), 1),
    ],
)
def test_generate_stops_at_its_own_tokens_and_the_answers(
    known: Any, ends: tuple[int, ...], stops: Any
) -> None:
    generation = GenerationConfig(eos_token_id=known)
    merge.add_stop_tokens(generation, ends)
    assert generation.eos_token_id == stops


def chat_base(folder: Path, pad: str) -> Path:
    """Write a base whose answers end with another token than eos."""
    words, model = tiny.tokenizer(), tiny.model()
    words.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    words.chat_template, words.pad_token = CHATML, pad
    model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_generate_stops_where_answers_were_trained_to_end(data: Path, tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", "<pad>")
    artifact = tuned(
        tmp_path / "sft",
        data,
        base,
        max_steps=1,
        text=TEXT | {"template": "chat", "max_prompt_tokens": 64},
        block_tokens=128,
    )
    place, _ = merged(tmp_path / "merge", artifact, base, template="chat")
    end = AutoTokenizer.from_pretrained(place).convert_tokens_to_ids("<|im_end|>")
    assert json.loads((place / "generation_config.json").read_text())["eos_token_id"] == [tiny.EOS, end]


def test_a_merged_reward_model_of_a_chat_pads_with_no_end_of_turn(data: Path, tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", "<|im_end|>")
    artifact = scored(
        tmp_path / "reward",
        data,
        base,
        text=TEXT | {"template": "chat", "max_prompt_tokens": 64},
        max_steps=1,
    )
    probes = json.loads((artifact / "reward.json").read_text())["probes"]
    assert {probe["answer"][-1] for probe in probes} == {
        AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    }
    place, _ = merged(tmp_path / "merge", artifact, base, template="chat")
    assert AutoTokenizer.from_pretrained(place).pad_token not in ("<|im_end|>", "<eos>")
