"""Test linear probing: the logistic regression, the choice of its penalty, and the reward model that starts
from it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from tasks.config.jobs import RewardJob
from tasks.config.sections.reward import Reward
from tasks.programs import reward
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.evaluation import linear_probe, probe_start, reward_evaluation
from tasks.rlhf.evaluation.linear_probe import WeightedPairs
from tasks.rlhf.models import reward_model
from tasks.rlhf.training import checkpoints
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}


def evidence(
    pairs: list[tuple[int, int]], *, questions: list[int] | None = None, margin: float = 0.0
) -> WeightedPairs:
    chosen, rejected = map(torch.tensor, zip(*pairs, strict=True))
    count = len(pairs)
    return WeightedPairs(
        chosen,
        rejected,
        torch.tensor(questions or range(count)),
        torch.full((count,), margin),
        torch.full((count,), 1 / count),
    )


def random(num_answers: int, num_pairs: int, width: int, *, signal: float) -> tuple[Tensor, WeightedPairs]:
    """Return answers whose first features say which is better, as strongly as ``signal``."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(num_answers, width, generator=generator)
    ends = torch.randint(num_answers, (num_pairs, 2), generator=generator)
    ends = ends[ends[:, 0] != ends[:, 1]]
    ahead = torch.sigmoid(signal * (features[ends[:, 0], 0] - features[ends[:, 1], 0])) > torch.rand(
        len(ends), generator=generator
    )
    found = evidence(
        [(a, b) if first else (b, a) for (a, b), first in zip(ends.tolist(), ahead.tolist(), strict=True)]
    )
    weight = torch.rand(len(ends), generator=generator)
    return features, found._replace(
        weight=weight / weight.sum(), margin=torch.randn(len(ends), generator=generator) / 2
    )


def newton(features: Tensor, found: WeightedPairs, strength: float) -> Tensor:
    """Return the same minimum by Newton's method in float64, from the pairs' differences."""
    differences = (features[found.chosen] - features[found.rejected]).double()
    weight = torch.zeros(features.shape[1], dtype=torch.double)
    for _ in range(30):
        wrong = torch.sigmoid(found.margin.double() - differences @ weight)
        gradient = strength * weight - differences.T @ (found.weight * wrong)
        curvature = differences.T @ (
            differences * (found.weight * wrong * (1 - wrong))[:, None]
        ) + strength * torch.eye(len(weight))
        weight = weight - torch.linalg.solve(curvature, gradient)
    return weight


def test_three_wins_of_four_are_log_3() -> None:
    features, found = torch.tensor([[1.0], [0.0]]), evidence([(0, 1), (0, 1), (0, 1), (1, 0)])
    assert linear_probe.fit_head(features, found, 0.0, torch.zeros(1)).item() == pytest.approx(
        1.098612, abs=1e-5
    )
    assert linear_probe.fit_head(features, found, 0.1, torch.zeros(1)).item() == pytest.approx(
        0.736876, abs=1e-5
    )  # .75 sigmoid(-w) - .25 sigmoid(w) = .1 w
    assert linear_probe.loss(torch.tensor([1.098612, 0.0]), found).item() == pytest.approx(
        0.562335, abs=1e-6
    )  # entropy of 3 : 1
    led = evidence([(0, 1), (0, 1), (0, 1), (0, 1)], margin=0.5)
    assert linear_probe.loss(torch.tensor([1.2, 0.0]), led).item() == pytest.approx(
        0.403186, abs=1e-6
    )  # -log sigmoid(.7)


@pytest.mark.parametrize("strength", [1.0, 0.03])
def test_the_fit_is_newtons(strength: float) -> None:
    features, found = random(60, 300, 5, signal=1.0)
    begin = torch.randn(5)
    assert torch.allclose(
        linear_probe.fit_head(features, found, strength, begin).double(),
        newton(features, found, strength),
        atol=1e-3,
    )


def test_units_and_origins_of_features_do_not_matter() -> None:
    features, found = random(60, 300, 5, signal=1.0)
    plain = linear_probe.fit_probe(features, found, seed=0)
    units, origins = torch.tensor([1e-3, 1.0, 50.0, 3.0, 0.2]), torch.tensor([5.0, 0.0, -100.0, 1.0, 0.0])
    other = linear_probe.fit_probe(features * units + origins, found, seed=0)
    assert other.penalty == plain.penalty
    assert torch.allclose(other.head * units, plain.head, rtol=1e-2, atol=1e-3)


def test_a_feature_that_never_changes_says_nothing() -> None:
    features, found = random(60, 300, 5, signal=1.0)
    features[:, 2] = 3.7
    head = linear_probe.fit_probe(features, found, seed=0).head
    assert head.shape == (1, 5)
    assert head[0, 2] == 0
    assert head[0, 0] > 0.3


def test_the_penalty_is_strong_where_there_is_nothing_to_learn() -> None:
    noise, clear = (
        linear_probe.fit_probe(*random(80, 160, 40, signal=signal), seed=0) for signal in (0.0, 8.0)
    )
    assert noise.penalty > 1 > clear.penalty
    assert noise.penalty == min(noise.losses, key=lambda strength: noise.losses[strength])
    assert set(noise.losses) == set(linear_probe.PENALTIES)


def test_a_questions_pairs_are_never_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    features, found = random(60, 300, 5, signal=1.0)
    found = found._replace(question=found.question // 10)
    fitted: list[set[int]] = []
    honest = linear_probe.fit_head

    def fit(some: Tensor, shown: WeightedPairs, *rest: Any) -> Tensor:
        fitted.append(set(shown.question.tolist()))
        return honest(some, shown, *rest)

    monkeypatch.setattr(linear_probe, "fit_head", fit)
    linear_probe.fit_probe(features, found, seed=0)
    everything = set(found.question.tolist())
    left_out = [everything - shown for shown in fitted[:: len(linear_probe.PENALTIES)]]
    assert fitted[-1] == everything
    assert sorted(number for part in left_out[: linear_probe.FOLDS] for number in part) == sorted(everything)


def test_one_question_is_enough() -> None:
    found = linear_probe.fit_probe(torch.randn(3, 4), evidence([(0, 1), (0, 2)], questions=[0, 0]), seed=0)
    assert found.penalty == max(linear_probe.PENALTIES)
    assert found.head.isfinite().all()
    assert found.losses == {}


def test_questions_that_were_not_drawn_are_as_if_they_were_not_there() -> None:
    """Even if no question of a fold was drawn."""
    features, found = random(60, 300, 5, signal=1.0)
    folds = torch.tensor(
        [linear_probe.mix(0, number) % linear_probe.FOLDS for number in found.question.tolist()]
    )
    there = (folds != 2) & (found.question % 3 > 0)
    drawn = found._replace(weight=found.weight * there / (found.weight * there).sum())
    ours, theirs = (
        linear_probe.fit_probe(features, drawn, seed=0),
        linear_probe.fit_probe(features, found.select(there), seed=0),
    )
    assert ours.penalty == theirs.penalty < 100
    assert torch.allclose(ours.head, theirs.head, atol=1e-5)
    assert ours.losses == pytest.approx(theirs.losses)


def test_redrawn_questions_are_as_many() -> None:
    drawn = linear_probe.bootstrap_counts(1000, seed=3)
    assert drawn.sum() == 1000
    assert 0.33 < (drawn == 0).float().mean() < 0.41  # 1/e
    assert not torch.equal(drawn, linear_probe.bootstrap_counts(1000, seed=4))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("probe")
    return {"data": tiny.data_folder(root / "data", 40), "model": tiny.base_folder(root / "base")}


def prepared(folder: Path, inputs: dict[str, Path], **changed: Any) -> Run:
    settings = {
        "lora": {"rank": 2, "alpha": 4.0},
        "max_steps": 4,
        "epochs": 10,
        "batch_size": 4,
        "held_out_share": 0.2,
        "probe": True,
    } | changed
    return Run(
        tiny.write_job(
            folder, "reward", {"seed": 0, "text": TEXT, "reward": settings}, inputs, checkpoint_steps=2
        )
    )


def trained(folder: Path, inputs: dict[str, Path], **changed: Any) -> Run:
    run = prepared(folder, inputs, **changed)
    reward.train(RewardJob.model_validate(run.record), run)
    return run


def weights(run: Run, number: str = "") -> dict[str, Tensor]:
    return load_file(run.artifact / f"adapter{number}" / "adapter_model.safetensors")


def score(run: Run, number: str = "") -> Tensor:
    (found,) = (tensor for name, tensor in weights(run, number).items() if "score" in name)
    return found


def said(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "measures.json").read_text())["probe"]
    return found


def summary(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    return found


def test_training_that_only_harms_leaves_the_probe(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = trained(tmp_path / "harmed", inputs, learning_rate=0.5)
    assert summary(run)["reward.best_step"] == 0
    assert summary(run)["reward.held_out_loss"] == pytest.approx(said(run)["held_out_loss"], abs=1e-5)
    assert summary(run)["reward_accuracy.votes"] == summary(run)["reward_accuracy.probe"]
    assert all((tensor == 0).all() for name, tensor in weights(run).items() if "lora_B" in name)
    assert reward_model.load_record(run.artifact)["members"] == 1


def test_training_begins_at_the_probe(inputs: dict[str, Path], tmp_path: Path) -> None:
    probed, plain = (
        trained(tmp_path / str(on), inputs, probe=on, max_steps=1, learning_rate=1e-6) for on in (True, False)
    )
    steps = [
        [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]
        for run in (probed, plain)
    ]
    assert [[line["step"] for line in lines] for lines in steps] == [[0, 1], [1]]
    assert steps[0][1]["loss"] < 0.3 < 0.6 < steps[1][0]["loss"]
    assert steps[0][0]["held_out_loss"] == said(probed)["held_out_loss"]
    assert steps[0][1]["held_out_loss"] == pytest.approx(said(probed)["held_out_loss"], abs=1e-3)
    assert not any("probe" in name for name in summary(plain))


def test_members_begin_at_probes_of_their_own(inputs: dict[str, Path], tmp_path: Path) -> None:
    run = trained(tmp_path / "ensemble", inputs, members=2, learning_rate=1e-6, max_steps=1)
    heads = [score(run, number) for number in ("", "-1")]
    assert torch.cosine_similarity(*heads).item() < 0.999
    assert len(said(run)["members"]) == 2


@pytest.mark.parametrize("cut", [0, 2])
def test_a_killed_run_keeps_its_probe(
    cut: int, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after the probe is saved, or between two steps."""
    killed, honest = prepared(tmp_path / "killed", inputs), checkpoints.save

    def save(folder: Path, step: int, *rest: Any, **more: Any) -> None:
        honest(folder, step, *rest, **more)
        if step >= cut:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        reward.train(RewardJob.model_validate(killed.record), killed)
    monkeypatch.setattr(checkpoints, "save", honest)
    monkeypatch.setattr(probe_start, "initialise_heads", None)  # it is not asked again
    shutil.rmtree(killed.artifact)  # as tasks.execution.run_stage does: checkpoints/ alone is kept
    again = Run(killed.directory)
    reward.train(RewardJob.model_validate(again.record), again)
    monkeypatch.undo()
    whole = trained(tmp_path / "whole", inputs)
    names = {path.relative_to(whole.artifact) for path in whole.artifact.rglob("*") if path.is_file()}
    assert {
        name for name in names if (whole.artifact / name).read_bytes() != (again.artifact / name).read_bytes()
    } == set()


@pytest.mark.parametrize(
    ("weigh", "weights"),
    [("pairs", [0.5, 0.125, 0.125, 0.125, 0.125]), ("questions", [2 / 3, 1 / 12, 1 / 12, 1 / 12, 1 / 12])],
)
def test_pairs_weigh_as_in_training(
    weigh: str, weights: list[float], inputs: dict[str, Path], tmp_path: Path
) -> None:
    """A question with one pair that is drawn several times, and one with four pairs."""
    one = Comparison(1, [1], [[2], [3]], [(0, 1)], [2.0], [True])
    four = Comparison(
        2, [1], [[2], [3], [4], [5]], [(0, 1), (0, 2), (0, 3), (1, 3)], [1.0] * 4, [False, None, True, True]
    )
    job = RewardJob.model_validate(prepared(tmp_path / "job", inputs, weigh=weigh, margin=0.1).record)
    found = probe_start.weighted_pairs(
        reward_evaluation.pairs_of([one, four]),
        torch.tensor([4.0, 1.0] if weigh == "pairs" else [2.0, 1.0]),
        probe_start.PairLoss(job.reward.margin, job.reward.weigh, 0.5),
    )
    assert found.weight.tolist() == pytest.approx(weights)
    assert found.margin.tolist() == pytest.approx([0.2 - 0.5, 0.1 + 0.5, 0.1, 0.1 - 0.5, 0.1 - 0.5])


@pytest.mark.parametrize(
    ("other", "match"),
    [({"start": "weights.safetensors"}, "set start to ''"), ({"centring": 0.1}, "set centring to 0")],
)
def test_what_a_probe_does_not_go_with_is_refused(other: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=f"{match}, or probe to false"):
        Reward(probe=True, **other)


def test_hidden_states_that_are_no_numbers_are_refused(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = shared_prompt.features
    monkeypatch.setattr(
        shared_prompt,
        "features",
        lambda model, batch: honest(model, batch).index_fill(1, torch.tensor([3]), float("inf")),
    )
    with pytest.raises(InputError, match=r"NaN or infinite.*set weights\.merged to float32"):
        trained(tmp_path / "inf", inputs)
