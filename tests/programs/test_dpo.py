"""Test DPO's program: where it starts, what its likelihood term does, that micro-batches change nothing."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.config.jobs import DpoJob, ReferenceJob
from tasks.config.sections.dpo import Dpo
from tasks.programs import dpo, reference
from tasks.programs.runtime import training_setup
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables import questions
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.models import fingerprint, loading, lora, trainable
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}
Trained = Callable[..., tuple[list[dict[str, Any]], Run]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("dpo")
    data = tiny.data_folder(root / "data", 40)
    found = {"data": data, "model": tiny.trained_folder(root / "base", data)}
    run = Run(tiny.write_job(root / "reference", "reference", {"text": TEXT}, found))
    reference.compute(ReferenceJob.model_validate(run.record), run)
    return found | {"reference": run.artifact}


@pytest.fixture
def trained(inputs: dict[str, Path], tmp_path: Path) -> Trained:
    """Train with some settings changed; return the lines of metrics.jsonl and the run."""

    def train(name: str = "dpo", *, micro_batch: int = 0, **changed: Any) -> tuple[list[dict[str, Any]], Run]:
        settings = {
            "lora": {"rank": 4, "alpha": 8.0},
            "max_steps": 6,
            "epochs": 10,
            "batch_size": 4,
        } | changed
        job = {"seed": 0, "text": TEXT, "dpo": settings}
        run = Run(tiny.write_job(tmp_path / name, "dpo", job, inputs, micro_batch=micro_batch))
        dpo.train(DpoJob.model_validate(run.record), run)
        return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()], run

    return train


def test_it_starts_at_ln_2_and_at_the_bases_own_likelihood_of_the_best_answers(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    (line,), _ = trained(max_steps=1)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["margin"] == pytest.approx(0, abs=1e-5)
    tokenizer, base = loading.load_tokenizer(inputs["model"]), loading.load(inputs["model"], device=tiny.CPU)
    rows = pq.read_table(inputs["data"] / "reward.parquet").to_pylist()
    encoded = comparisons.encode_with(
        Encoder(tokenizer, template="question-answer", **TEXT), comparisons.from_pairs(rows)
    )
    indices, _ = comparisons.hold_out([c.question_id for c in encoded], share=0.05, seed=0)
    training = [encoded[index] for index in indices]
    losses = []
    for i in schedules.batch_indices(0, num_rows=len(training), batch_size=4, seed=0):
        for best in training[i].best:
            ids = torch.tensor([training[i].prompt + training[i].answers[best]])
            labels = torch.where(torch.arange(ids.shape[1]) < len(training[i].prompt), -100, ids)
            losses.append(
                base(input_ids=ids, labels=labels).loss.item()
            )  # the library's own mean over the answer's tokens
    assert line["nll"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_micro_batches_change_nothing(trained: Trained, micro_batch: int) -> None:
    whole, run = trained("whole")
    parts, other = trained("parts", micro_batch=micro_batch)
    for line in (whole[0], parts[0]):
        del line["accuracy"]  # the untrained policy's margins are nothing but rounding
    for one, two in zip(whole, parts, strict=True):
        assert one == pytest.approx(two, abs=2e-4)
    first, second = (load_file(r.artifact / "adapter" / lora.WEIGHTS) for r in (run, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-2)


def test_the_likelihood_term_keeps_the_best_answers_likely_and_pairs_are_learnt(trained: Trained) -> None:
    plain, _ = trained("plain", nll_weight=0.0, max_steps=20)
    anchored, _ = trained("anchored", nll_weight=2.0, max_steps=20)
    assert anchored[-1]["nll"] < plain[-1]["nll"]
    assert min(line["loss"] for line in plain) < 0.6
    assert min(line["loss"] for line in anchored) < 0.65


@pytest.mark.parametrize(
    "settings",
    [
        {"tune": "full", "learning_rate": 1e-3},
        {"tune": "bottleneck", "bottleneck": {"width": 8}},
        {"tune": "bottleneck", "bottleneck": {"whole_layers": True}},
    ],
    ids=["full", "bottleneck", "whole layers"],
)
def test_everything_that_can_be_trained_starts_as_the_reference_and_learns(
    trained: Trained, settings: dict[str, Any]
) -> None:
    lines, run = trained(max_steps=20, nll_weight=0.0, **settings)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["held_out_loss"] < 0.65
    assert {path.name for path in run.artifact.iterdir() if path.is_dir()} == {
        "model" if settings["tune"] == "full" else "bottleneck"
    }


def test_a_bottleneck_in_place_of_the_mlp_starts_elsewhere(trained: Trained) -> None:
    lines, _ = trained(max_steps=2, tune="bottleneck", bottleneck={"form": "replace", "width": 8})
    assert abs(lines[0]["chosen_reward"]) > 0.1


def test_ipo_starts_at_its_target_squared_and_holds_the_margin_down(trained: Trained) -> None:
    lines, _ = trained("ipo", loss="ipo", beta=0.5, nll_weight=0.0, max_steps=30)
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-4)  # (0 - 1 / (2 beta))^2
    plain, _ = trained("plain", beta=0.5, nll_weight=0.0, max_steps=30)
    assert lines[-1]["margin"] < plain[-1]["margin"]


def test_every_kind_of_policy_is_had_back_as_it_was_trained(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    for name, settings in {
        "lora": {},
        "full": {"tune": "full", "learning_rate": 1e-3},
        "bottleneck": {"tune": "bottleneck", "bottleneck": {"width": 8}},
    }.items():
        kept: list[torch.Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                dpo,
                "evaluate",
                lambda policy, *_, kept=kept, **__: (
                    kept.append(policy(ids).logits.detach()) or dpo.Evaluation(0.5, wilson(1, 2))
                ),
            )
            _, run = trained(name, evaluations=1, **settings)
        again = partial(loading.load, inputs["model"], device=tiny.CPU)
        base = again()
        _, active = trainable.load(
            run.artifact,
            base,
            "dpo",
            actual=fingerprint.compute_fingerprint(inputs["model"], base),
            setting="weights.merged",
            reload_base=again,
        )
        with active() as policy, torch.no_grad():
            torch.testing.assert_close(policy(ids).logits, kept[-1], atol=1e-5, rtol=1e-5)
        with pytest.raises(InputError, match="weights were") if name != "full" else nullcontext():
            other = fingerprint.Fingerprint("sha256:0", "sha256:0", "float32", "float32")
            trainable.load(
                run.artifact, again(), "dpo", actual=other, setting="weights.merged", reload_base=again
            )


def test_a_reference_of_other_answers_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = pq.read_table(inputs["reference"] / "reference.parquet")
    (tmp_path / "shorter").mkdir()
    pq.write_table(table.slice(1), tmp_path / "shorter" / "reference.parquet")
    job = {"seed": 0, "text": TEXT, "dpo": {"max_steps": 1}}
    run = Run(tiny.write_job(tmp_path / "dpo", "dpo", job, inputs | {"reference": tmp_path / "shorter"}))
    with pytest.raises(InputError, match="run the stage reference again"):
        dpo.train(DpoJob.model_validate(run.record), run)


def test_a_reference_of_another_model_is_noticed_before_the_first_step(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    table = pq.read_table(inputs["reference"] / "reference.parquet")
    moved = table.set_column(3, "log_prob", pc.add(table["log_prob"], 1.0))
    shutil.copytree(inputs["reference"], tmp_path / "moved")
    pq.write_table(moved, tmp_path / "moved" / "reference.parquet")
    job = {"seed": 0, "text": TEXT, "dpo": {"max_steps": 1}}
    run = Run(tiny.write_job(tmp_path / "dpo", "dpo", job, inputs | {"reference": tmp_path / "moved"}))
    with pytest.raises(StepZeroError, match="the reference stage saw another model"):
        dpo.train(DpoJob.model_validate(run.record), run)
    assert not (run.directory / "metrics.jsonl").read_text()


def test_the_reference_is_what_the_library_says_of_each_answer(inputs: dict[str, Path]) -> None:
    tokenizer, base = loading.load_tokenizer(inputs["model"]), loading.load(inputs["model"], device=tiny.CPU)
    rows = pq.read_table(inputs["data"] / "reward.parquet").to_pylist()
    encoded = comparisons.encode_with(
        Encoder(tokenizer, template="question-answer", **TEXT), comparisons.from_pairs(rows)
    )
    known = iter(pq.read_table(inputs["reference"] / "reference.parquet").to_pylist())
    for question in encoded:
        for number, answer in enumerate(question.answers):
            ids = torch.tensor([question.prompt + answer])
            labels = torch.where(torch.arange(ids.shape[1]) < len(question.prompt), -100, ids)
            with torch.no_grad():
                expected = -base(input_ids=ids, labels=labels).loss.item() * len(answer)
            row = next(known)
            assert (row["question_id"], row["answer"], row["tokens"]) == (
                question.question_id,
                number,
                len(answer),
            )
            assert row["log_prob"] == pytest.approx(expected, abs=1e-3)
    assert next(known, None) is None


def test_the_reference_reads_a_batch_of_questions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(0)
    asked = [
        Comparison(n, [7] * random.randrange(9), [[n] * random.randrange(9)] * 2, [(0, 1)], [1.0], [None])
        for n in range(40)
    ]
    decoded: list[int] = []
    batches: list[list[int]] = []

    def decode(batch: pa.RecordBatch) -> list[Comparison]:
        decoded.extend(batch["question_id"].to_pylist())
        return questions.decode(batch)

    def log_probs(_: Any, inputs: shared_prompt.SharedPromptBatch) -> Tensor:
        batches.append(decoded.copy())
        decoded.clear()
        return torch.zeros(len(shared_prompt.num_tokens(inputs)))

    monkeypatch.setattr(shared_prompt, "log_probs", log_probs)
    table = TokenTable([questions.to_batch(asked[:25]), questions.to_batch(asked[25:])], decode)
    base: Any = SimpleNamespace(device=tiny.CPU, config=SimpleNamespace(hidden_size=8))
    found = reference.log_probs(base, table, pad_id=0, batch_size=6, report_progress=lambda *_: None)
    assert found == {n: [0.0, 0.0] for n in range(40)}
    by_length = sorted(asked, key=lambda c: len(c.prompt) + sum(map(len, c.answers)))
    parts = comparisons.micro_batches(by_length, 6)
    assert batches == [[c.question_id for c in part] for part in parts]


def test_its_accuracy_is_of_evaluation_questions_redrawn_whole(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Swapping the sides of the evaluation pairs inverts the accuracy; its interval is of 20 questions, not
    40 pairs.
    """
    _, run = trained("plain", max_steps=3, evaluations=1)
    table = pq.read_table(inputs["data"] / "evaluation_pairs.parquet")
    data = shutil.copytree(inputs["data"], tmp_path / "swapped")
    swapped = table.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select(table.column_names)
    pq.write_table(swapped, data / "evaluation_pairs.parquet")
    known = inputs | {"data": data}
    other = Run(tiny.write_job(tmp_path / "again", "reference", {"text": TEXT}, known))
    reference.compute(ReferenceJob.model_validate(other.record), other)
    job = json.loads((run.directory / "job.json").read_text())["job"]
    turned = Run(tiny.write_job(tmp_path / "turned", "dpo", job, known | {"reference": other.artifact}))
    dpo.train(DpoJob.model_validate(turned.record), turned)
    told, said = (json.loads((one.artifact / "summary.json").read_text()) for one in (run, turned))
    assert told["measured"] == {"split": "evaluation", "questions": 20, "pairs": 40}
    before, after = (one["metrics"]["dpo.implicit_accuracy"] for one in (told, said))
    assert (before["n"], after["value"]) == (40, pytest.approx(1 - before["value"]))
    assert told["metrics"]["dpo.held_out_loss"] == said["metrics"]["dpo.held_out_loss"]
    plain = wilson(before["value"] * 40, 40)
    assert before["low"] <= plain.low < plain.high <= before["high"]


def test_a_policy_that_prefers_nothing_is_never_right(inputs: dict[str, Path]) -> None:
    """With the reference's own log-probabilities every margin is 0, and a tie counts as wrong."""
    questions = [
        comparisons.Comparison(1, [5], [[6, 1], [7, 1]], [(0, 1)], [1.0], [None]),
        comparisons.Comparison(2, [5], [[6, 1], [8, 1]], [(0, 1)], [1.0], [None]),
    ]
    base = loading.load(inputs["model"], device=tiny.CPU)
    collate = partial(
        comparisons.collate, pad_id=tiny.PAD, device=tiny.CPU, hidden_size=base.config.hidden_size
    )
    whole = collate(questions)
    own = shared_prompt.log_probs(base, whole.inputs).detach()
    found = dpo.evaluate(base, questions, {1: own[:2], 2: own[2:]}, Dpo(), collate)
    assert (found.accuracy.value, found.accuracy.n) == (0, 2)
    assert found.loss == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_without_the_evaluation_pairs_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    shutil.copy(inputs["reference"] / "reference.parquet", tmp_path / "old")
    job = {"seed": 0, "text": TEXT, "dpo": {"max_steps": 1}}
    run = Run(tiny.write_job(tmp_path / "dpo", "dpo", job, inputs | {"reference": tmp_path / "old"}))
    with pytest.raises(InputError, match="run the stage reference again"):
        dpo.train(DpoJob.model_validate(run.record), run)


def test_evaluation_pairs_are_checked_like_those_that_are_trained_on(
    trained: Trained, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared prompts are compared on them, and a loss that is not finite ends the run with one sentence."""
    asked = set(pq.read_table(inputs["data"] / "evaluation_pairs.parquet")["question_id"].to_pylist())
    seen: set[int] = set()
    honest = dpo.evaluate

    def overflowing(
        policy: Any, questions: list[comparisons.Comparison], *rest: Any, **more: Any
    ) -> dpo.Evaluation:
        found = honest(policy, questions, *rest, **more)
        return found._replace(loss=math.nan) if questions[0].question_id in asked else found

    monkeypatch.setattr(
        training_setup,
        "check_prompt_sharing",
        lambda _run, _base, *parts, **_: seen.update(c.question_id for c in chain(*parts)),
    )
    monkeypatch.setattr(dpo, "evaluate", overflowing)
    with pytest.raises(InputError, match=r"^The loss of evaluation pairs is nan"):
        trained(max_steps=1)
    assert asked <= seen
