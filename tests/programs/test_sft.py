"""Test SFT's program: what is trained, from which weights, for how long, and what its figures mean."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tasks.config.jobs import SftJob
from tasks.programs import sft
from tasks.programs.runtime.program import Run
from tasks.rlhf.compute import free_memory
from tasks.rlhf.models import loading, lora
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 64, "max_answer_tokens": 64}
Trained = Callable[..., Run]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sft")
    return {"data": tiny.data_folder(root / "data", 60), "base": tiny.base_folder(root / "base")}


@pytest.fixture
def trained(inputs: dict[str, Path], tmp_path: Path) -> Trained:
    """Train with some settings changed."""

    def train(
        name: str = "sft",
        *,
        machine: dict[str, Any] | None = None,
        given: dict[str, Path] | None = None,
        **changed: Any,
    ) -> Run:
        settings = {
            "lora": {"rank": 4, "alpha": 8.0},
            "max_steps": 6,
            "epochs": 10,
            "batch_size": 2,
            "block_tokens": 128,
        } | changed
        job = {"seed": 0, "text": TEXT, "sft": settings}
        run = Run(tiny.write_job(tmp_path / name, "sft", job, inputs | (given or {}), **machine or {}))
        sft.train(SftJob.model_validate(run.record), run)
        return run

    return train


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Run) -> dict[str, float]:
    found: dict[str, float] = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    return found


@pytest.mark.parametrize("loss_on", ["every", "last", "all"])
def test_the_held_out_loss_is_the_librarys_own_over_documents_alone(
    trained: Trained, inputs: dict[str, Path], loss_on: str
) -> None:
    run = trained(loss_on=loss_on)
    tokenizer = tiny.tokenizer()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(inputs["base"]), run.artifact / "adapter"
    ).eval()
    total = count = 0.0
    for row in pq.read_table(inputs["data"] / "finetune.parquet").to_pylist()[::20]:
        prompt = tokenizer(f"Question: {row['prompt']}\n\nAnswer:")["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(f" {row['answer'].strip()}")["input_ids"], tiny.EOS]])
        labels = (
            ids.clone()
            if loss_on == "all"
            else torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        )
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * tokens
        count += tokens
    assert metrics(run)["sft.held_out_loss"] == pytest.approx(total / count, abs=1e-5)
    assert metrics(run)["sft.perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_change_nothing(trained: Trained, micro_batch: int) -> None:
    whole, parts = (
        trained("whole", batch_size=4),
        trained("parts", batch_size=4, machine={"micro_batch": micro_batch}),
    )
    for one, two in zip(lines(whole), lines(parts), strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_every_weight_can_be_trained_and_is_an_ordinary_model(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    run = trained(tune="full", learning_rate=1e-3, max_steps=20)
    assert lines(run)[-1]["held_out_loss"] < 0.9 * lines(run)[0]["loss"]
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs["base"], run.artifact / "model")
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(run.artifact / "model")
    assert not (run.artifact / "adapter").exists()


def test_the_best_evaluations_weights_are_kept(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.rlhf.training.loop.Training.learning_rate", lambda *_: 1e-3)  # of any length
    told = iter([0.5, 0.3, 0.4, 0.3])
    with monkeypatch.context() as patch:
        patch.setattr(sft, "held_out_loss", lambda *_, **__: next(told))
        best = trained("best", evaluations=3)
    four, last = trained("four", evaluations=1, max_steps=4), trained("last", evaluations=3, keep="last")
    weights = [load_file(run.artifact / "adapter" / lora.WEIGHTS) for run in (best, four, last)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert metrics(best)["sft.best_step"] == 4


def test_it_stops_where_nothing_gets_better(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.5, 0.3, 0.4, 0.6, 0.3])
    monkeypatch.setattr(sft, "held_out_loss", lambda *_, **__: next(told))
    assert [line["step"] for line in lines(trained(evaluations=6, patience=2))] == [1, 2, 3, 4]


def test_a_run_that_diverges_is_refused_in_a_sentence(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "held_out_loss", lambda *_, **__: math.nan)
    with pytest.raises(InputError, match="training has diverged; lower learning_rate"):
        trained()


def test_it_starts_from_weights_that_it_is_given(trained: Trained) -> None:
    first = trained("first", max_steps=20)
    for name, start in (("folder", first.artifact), ("file", first.artifact / "adapter" / lora.WEIGHTS)):
        second = trained(name, given={"start": start}, max_steps=1, learning_rate=1e-9)
        assert lines(second)[0]["held_out_loss"] == pytest.approx(lines(first)[-1]["held_out_loss"], abs=1e-5)


def test_weights_that_do_not_fit_are_refused(trained: Trained, inputs: dict[str, Path]) -> None:
    with pytest.raises(
        InputError, match="does not hold the weights to start from: 28 of 28 are missing or of another shape"
    ):
        trained(given={"start": inputs["base"]})
    rank = trained("rank", lora={"rank": 2}, max_steps=1)
    with pytest.raises(InputError, match="28 of 28 are missing or of another shape"):
        trained("other", given={"start": rank.artifact})


@pytest.mark.parametrize(
    ("schedule", "rates"), [("constant", [1e-3, 1e-3, 1e-3]), ("linear", [1e-3, 2e-3 / 3, 1e-3 / 3])]
)
def test_schedules(trained: Trained, schedule: str, rates: list[float]) -> None:
    run = trained(schedule=schedule, learning_rate=1e-3, max_steps=3, warmup_share=0)
    assert [line["learning_rate"] for line in lines(run)] == pytest.approx(rates)


def test_what_does_not_fit_is_refused_before_it_is_loaded_and_advice_is_given(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "available", lambda *_: 10_000)
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(
        InputError,
        match=(
            r"A training step would take about .* MB: .*; 0 MB are free: nothing that can be set here "
            r"makes it fit"
        ),
    ):
        trained()
    monkeypatch.setattr(free_memory, "available", lambda *_: 2_000_000)
    with pytest.raises(InputError, match=r"2 MB are free: with machine.micro_batch=\d+ it takes"):
        trained("larger", batch_size=64)


def test_a_base_in_float16_is_not_trained_on_as_it_is(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path
) -> None:
    half = tiny.base_folder(tmp_path / "half")
    tiny.model().to(torch.float16).save_pretrained(half)
    with pytest.raises(InputError, match=r"stored in float16, in which small gradients vanish: set weights"):
        trained(given={"base": half})


def test_an_artifacts_own_weights_are_started_from_and_not_those_beside_them(
    trained: Trained, tmp_path: Path
) -> None:
    first = trained("first", max_steps=20)
    (first.artifact / "critic").mkdir()  # as in PPO's
    (first.artifact / "critic" / lora.WEIGHTS).write_bytes(
        (trained("other", max_steps=1).artifact / "adapter" / lora.WEIGHTS).read_bytes()
    )
    second = trained("second", given={"start": first.artifact}, max_steps=1, learning_rate=1e-9)
    assert lines(second)[0]["held_out_loss"] == pytest.approx(lines(first)[-1]["held_out_loss"], abs=1e-5)
