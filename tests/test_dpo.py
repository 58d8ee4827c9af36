"""DPO's program: where it starts, what its likelihood term does, and that micro-batches change nothing."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file

from tasks.programs import dpo, reference
from tasks.programs.config import DpoJob, ReferenceJob
from tasks.programs.entry import Run
from tasks.rlhf import adapters, bases, comparisons, models, schedules

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}
Trained = Callable[..., tuple[list[dict[str, Any]], Run]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dpo")
    data = tiny.data_folder(root / "data", 40)
    found = {"data": data, "model": tiny.taught_folder(root / "base", data)}
    run = Run(tiny.prepare(root / "reference", "reference", {"text": TEXT}, found))
    reference.compute(ReferenceJob.model_validate(run.record), run)
    return found | {"reference": run.artifact}


@pytest.fixture
def trained(inputs: dict[str, Path], tmp_path: Path) -> Trained:
    """Train with some settings changed; gives the lines of metrics.jsonl and the run."""

    def train(name: str = "dpo", *, micro_batch: int = 0, **changed: Any) -> tuple[list[dict[str, Any]], Run]:
        settings = {"lora": {"rank": 4, "alpha": 8.0}, "max_steps": 6, "epochs": 10, "batch_size": 4} | changed
        job = {"seed": 0, "text": TEXT, "dpo": settings}
        run = Run(tiny.prepare(tmp_path / name, "dpo", job, inputs, micro_batch=micro_batch))
        dpo.train(DpoJob.model_validate(run.record), run)
        return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()], run

    return train


def test_it_starts_at_ln_2_and_at_the_bases_own_likelihood_of_the_best_answers(trained: Trained, inputs: dict[str, Path]) -> None:
    (line,), _ = trained(max_steps=1)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["margin"] == pytest.approx(0, abs=1e-5)
    tokenizer, base = models.load_tokenizer(inputs["model"]), bases.load(inputs["model"], device=tiny.CPU)
    rows = pq.read_table(inputs["data"] / "reward.parquet").to_pylist()
    encoded = comparisons.encode(comparisons.from_pairs(rows), tokenizer, template="question-answer", **TEXT)
    training, _ = comparisons.hold_out(encoded, share=0.05, seed=0)
    losses = []
    for i in schedules.batch_indices(0, num_rows=len(training), batch_size=4, seed=0):
        for best in training[i].best:
            ids = torch.tensor([training[i].prompt + training[i].answers[best]])
            labels = torch.where(torch.arange(ids.shape[1]) < len(training[i].prompt), -100, ids)
            losses.append(base(input_ids=ids, labels=labels).loss.item())  # the library's own mean over the answer's tokens
    assert line["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_change_nothing(trained: Trained, micro_batch: int) -> None:
    whole, run = trained("whole")
    parts, other = trained("parts", micro_batch=micro_batch)
    for one, two in zip(whole, parts, strict=True):
        assert one == pytest.approx(two, abs=2e-4)
    first, second = (load_file(r.artifact / "adapter" / adapters.WEIGHTS) for r in (run, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-2)


def test_the_likelihood_term_keeps_the_best_answers_likely_and_pairs_are_learnt(trained: Trained) -> None:
    plain, _ = trained("plain", nll_weight=0.0, max_steps=20)
    anchored, _ = trained("anchored", nll_weight=2.0, max_steps=20)
    assert anchored[-1]["nll"] < plain[-1]["nll"]
    assert min(line["loss"] for line in plain) < 0.6
    assert min(line["loss"] for line in anchored) < 0.65
