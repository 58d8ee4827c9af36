"""Test the reward model's program: losses, rankings, ensembles, full fine-tuning, and the figures that it
reports.
"""

import json
import math
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from tasks.config.jobs import RewardJob
from tasks.config.sections.reward import Reward
from tasks.programs import reward
from tasks.programs.runtime import reward_report, reward_tests, training_setup
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import comparisons, sequences, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.evaluation import reward_evaluation
from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.models import loading, lora, reward_model
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}
Trained = Callable[..., Run]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reward")
    return {"data": tiny.data_folder(root / "data", 40), "model": tiny.base_folder(root / "base")}


@pytest.fixture
def trained(inputs: dict[str, Path], tmp_path: Path) -> Trained:
    """Train with some settings changed."""

    def train(
        name: str = "reward",
        *,
        machine: dict[str, Any] | None = None,
        text: dict[str, int] = TEXT,
        **changed: Any,
    ) -> Run:
        settings = {
            "lora": {"rank": 4, "alpha": 8.0},
            "max_steps": 6,
            "epochs": 10,
            "batch_size": 4,
            "held_out_share": 0.2,
        } | changed
        run = Run(
            tiny.write_job(
                tmp_path / name,
                "reward",
                {"seed": 0, "text": text, "reward": settings},
                inputs,
                **machine or {},
            )
        )
        reward.train(RewardJob.model_validate(run.record), run)
        return run

    return train


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


def summary(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())
    return found


def loss(rewards: list[float], questions: list[Comparison], *, ahead: float = 0.0, **settings: Any) -> float:
    """Return the step's loss if the model gave these rewards to all answers of these questions."""
    batch = comparisons.collate(questions, pad_id=0, device=tiny.CPU, hidden_size=8)
    pairs = sum(len(c.pairs) for c in questions)
    counts = {"num_pairs": pairs, "num_questions": len(questions)}
    return reward.ranking_loss(
        torch.tensor(rewards), batch, Reward(**settings), age_bias=ahead, **counts
    ).item()


def ranked(scores: list[float], **more: Any) -> Comparison:
    """Return a question whose answers have these scores, best first."""
    row = {
        "question_id": 1,
        "prompt": "p",
        "answers": [f"a{i}" for i in range(len(scores))],
        "scores": scores,
        "ages": None,
    } | more
    (texts,) = comparisons.from_rankings([row], most_answers=9).values()
    return Comparison(1, [5], [[6, 1] for _ in texts.answers], texts.pairs, texts.gaps, texts.older)


# ------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("weigh", ["pairs", "questions"])
def test_the_loss_of_a_ranking_of_four_by_hand(weigh: str) -> None:
    assert loss([2.0, 1.0, 0.5, -1.0], [ranked([4, 3, 2, 1])], weigh=weigh) == pytest.approx(
        0.2276134, abs=1e-6
    )


def test_a_question_with_many_pairs_counts_as_each_pair_or_as_one_question() -> None:
    questions = [ranked([4, 3, 2, 1]), ranked([1, 0])]
    rewards = [2.0, 1.0, 0.5, -1.0, 0.0, 0.0]
    assert loss(rewards, questions, weigh="pairs") == pytest.approx((6 * 0.2276134 + 0.6931472) / 7, abs=1e-6)
    assert loss(rewards, questions, weigh="questions") == pytest.approx((0.2276134 + 0.6931472) / 2, abs=1e-6)


def test_a_margin_asks_for_more_where_the_scores_are_further_apart() -> None:
    near, far = ranked([2, 1]), ranked([5, 1])
    assert loss([3.0, 1.0], [near], margin=0.5) == pytest.approx(0.201413, abs=1e-5)  # -log sigmoid(1.5)
    assert loss([3.0, 1.0], [far], margin=0.5) == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0)


def test_the_older_answer_is_ahead() -> None:
    older, younger, nobody = (ranked([2, 1], ages=ages) for ages in ([1, 2], [2, 1], None))
    assert loss([1.0, 0.0], [older], ahead=0.7) == pytest.approx(0.167786, abs=1e-6)  # -log sigmoid(1.7)
    assert loss([1.0, 0.0], [younger], ahead=0.7) == pytest.approx(0.554355, abs=1e-6)  # -log sigmoid(0.3)
    assert loss([1.0, 0.0], [nobody], ahead=0.7) == pytest.approx(0.313262, abs=1e-6)  # -log sigmoid(1)
    assert comparisons.age_bias([older, older, younger, nobody]) == pytest.approx(
        0.405465, abs=1e-6
    )  # log(3 / 2): one more on either side
    assert comparisons.age_bias([nobody]) == 0


def test_a_model_is_measured_with_and_without_the_ages() -> None:
    questions = [ranked([2, 1], ages=ages) for ages in ([1, 2], [1, 2], [2, 1], None)]
    rewards = torch.tensor([0.0, 0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    pairs = reward_evaluation.pairs_of(questions)
    found = reward_evaluation.accuracies(pairs, rewards, age_bias=0.7)
    assert (found["votes"].wilson.value, found["knowing_age"].wilson.value) == (
        0.75,
        1,
    )  # the first pair is told by age alone
    assert found["knowing_age_over_older_wins"].value == pytest.approx(1 - 2.5 / 4)
    assert "knowing_age" not in reward_evaluation.accuracies(pairs, rewards)
    each = [0.598139, 0.167786, 0.554355, 0.313262]  # -log sigmoid of .2, 1.7, .3, 1
    assert reward_evaluation.held_out_loss(pairs, rewards, age_bias=0.7) == pytest.approx(
        sum(each) / 4, abs=1e-6
    )


def weighed(chosen: list[int], rejected: list[int], older: list[float]) -> reward_evaluation.Pairs:
    """Return pairs of answers of so many tokens."""
    numbers, count = torch.arange(2 * len(chosen)), len(chosen)
    tokens = torch.tensor(chosen + rejected, dtype=torch.float64)
    question, exact = torch.arange(count), torch.tensor(older, dtype=torch.float64)
    return reward_evaluation.Pairs(
        numbers[:count], numbers[count:], question, torch.ones(count), exact, tokens, question.repeat(2)
    )


def test_each_rule_weighs_what_it_says_beside_the_other() -> None:
    age_alone = reward_evaluation.fit_baseline_rules(weighed([5] * 4, [5] * 4, [1, 1, 1, 0]))
    assert age_alone.tolist() == pytest.approx([0, math.log(3)], abs=0.01)
    length_alone = reward_evaluation.fit_baseline_rules(
        weighed([20, 20, 20, 10], [10, 10, 10, 20], [0.5] * 4)
    )
    assert length_alone.tolist() == pytest.approx([math.log(3) / math.log(2), 0], abs=0.02)
    always = reward_evaluation.fit_baseline_rules(weighed([20] * 4, [10] * 4, [0.5] * 4))
    assert 2 < always[0] < 20


def test_the_rules_weights_are_a_minimum_and_know_no_unit_of_length() -> None:
    generator = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randint(5, 300, (200,), generator=generator).tolist() for _ in range(2))
    older = (torch.randint(3, (200,), generator=generator) / 2).tolist()
    pairs = weighed(chosen, rejected, older)
    weights = reward_evaluation.fit_baseline_rules(pairs).requires_grad_(True)
    lead = weights[0] * (pairs.tokens[pairs.chosen].log() - pairs.tokens[pairs.rejected].log()) + weights[
        1
    ] * (2 * pairs.older - 1)
    (torch.nn.functional.softplus(-lead).mean() + 1e-3 / 2 * weights.square().sum()).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-5
    other = reward_evaluation.fit_baseline_rules(pairs._replace(tokens=7 * pairs.tokens))
    assert torch.allclose(other, weights.detach(), atol=1e-5)


def test_a_model_that_knows_length_and_age_alone_has_nothing_over_both_rules() -> None:
    pairs = weighed([20, 20, 10, 30], [10, 10, 30, 20], [1, 0, 1, 0.5])
    together = torch.tensor([1.0, 0.7], dtype=torch.float64)
    found = reward_evaluation.accuracies(pairs, pairs.tokens.log(), age_bias=0.7, baseline=together)
    assert (
        found["rules_together"].wilson.value == found["knowing_age"].wilson.value == 0.5
    )  # right; length over age; age is too little; length alone
    assert (found["over_rules_together"].value, found["knowing_age_over_rules_together"].value) == (0.25, 0)
    assert "rules_together" not in reward_evaluation.accuracies(
        pairs._replace(older=torch.full((4,), 0.5)), pairs.tokens.log(), baseline=together
    )


def test_a_model_trained_with_a_head_start_says_so(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(inputs["data"], tmp_path / "dated")
    for name in ("reward", "evaluation_pairs"):
        table = pq.read_table(tmp_path / "dated" / f"{name}.parquet")
        dated = pa.array([number % 4 > 0 for number in range(len(table))])
        pq.write_table(
            table.set_column(table.column_names.index("chosen_older"), "chosen_older", dated),
            tmp_path / "dated" / f"{name}.parquet",
        )
    monkeypatch.setitem(inputs, "data", tmp_path / "dated")
    run, plain = trained("ahead", age_bias=True, max_steps=2), trained("plain", max_steps=2)
    assert reward_model.load_record(run.artifact)["head_start"] == pytest.approx(math.log(3), abs=0.3)
    assert reward_model.load_record(plain.artifact)["head_start"] == 0
    added = summary(run)["metrics"].keys() - summary(plain)["metrics"].keys()
    assert added == {
        f"reward_accuracy.knowing_age{rest}"
        for rest in ("", "_over_longer_wins", "_over_older_wins", "_over_rules_together")
    }
    assert lines(run)[0]["loss"] != lines(plain)[0]["loss"]


def test_centring_adds_the_squared_sum() -> None:
    plain = loss([3.0, 1.0], [ranked([2, 1])])
    assert loss([3.0, 1.0], [ranked([2, 1])], centring=0.01) == pytest.approx(plain + 0.16, abs=1e-6)


# ----------------------------------------------------------------------------------------- rankings


def test_a_ranking_gives_every_pair_whose_scores_differ() -> None:
    question = ranked([1, 3, 3, 0], ages=[1, 2, 3, 4])
    assert [(w, x) for w, x in question.pairs] == [
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
        (2, 3),
    ]  # best first: 3, 3, 1, 0
    assert question.gaps == [2, 3, 2, 3, 1]
    assert question.older == [False, True, False, True, True]


def test_a_ranking_without_order_is_no_question() -> None:
    row = {"question_id": 1, "prompt": "p", "answers": ["a", "b"], "scores": [1.0, 1.0], "ages": None}
    assert comparisons.from_rankings([row], most_answers=9) == {}


@pytest.mark.parametrize(
    ("count", "most", "places"), [(3, 9, [0, 1, 2]), (9, 3, [0, 4, 8]), (10, 4, [0, 3, 6, 9]), (5, 2, [0, 4])]
)
def test_many_answers_are_thinned_out_evenly_and_the_ends_stay(
    count: int, most: int, places: list[int]
) -> None:
    assert comparisons.evenly_spaced(count, most) == places


def test_rankings_are_trained_on_and_every_answer_is_forwarded_once(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    honest = shared_prompt.scores

    def counted(model: Any, head: Any, batch: shared_prompt.SharedPromptBatch) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(len(batch.ends))
        return honest(model, head, batch)

    monkeypatch.setattr(shared_prompt, "scores", counted)
    run = trained(comparisons="rankings", max_steps=2)
    assert seen == [12, 12]  # four questions of three answers
    assert summary(run)["pairs"] == 2 * summary(run)["questions"]  # the two good answers tie


# ----------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "settings",
    [{}, {"comparisons": "rankings", "weigh": "questions", "margin": 0.1, "centring": 0.01}],
    ids=["pairs", "rankings"],
)
def test_micro_batches_change_nothing(trained: Trained, settings: dict[str, Any]) -> None:
    whole, parts = trained("whole", **settings), trained("parts", machine={"micro_batch": 1}, **settings)
    for one, two in zip(lines(whole), lines(parts), strict=True):
        assert one == pytest.approx(two, abs=2e-4)


def test_pairs_are_learnt(trained: Trained) -> None:
    run = trained(max_steps=30, batch_size=8)
    assert lines(run)[0]["loss"] > 0.6
    assert lines(run)[-1]["held_out_loss"] < 0.3
    assert summary(run)["metrics"]["reward_accuracy.votes"]["value"] > 0.8


def test_the_best_weights_are_kept_and_not_the_last(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.rlhf.training.loop.Training.learning_rate", lambda *_: 1e-3)  # of any length
    told = iter([0.5, 0.3, 0.4, 0.3])  # the last of the artifact
    with monkeypatch.context() as patch:
        patch.setattr(reward_evaluation, "held_out_loss", lambda *_, **__: next(told))
        best = trained("best", evaluations=3)
    four, last = trained("four", evaluations=1, max_steps=4), trained("last", evaluations=3, keep="last")
    weights = [load_file(run.artifact / "adapter" / lora.WEIGHTS) for run in (best, four, last)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_training_stops_where_nothing_gets_better(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.5, 0.3, 0.4, 0.6, 0.1, 0.0])
    monkeypatch.setattr(reward_evaluation, "held_out_loss", lambda *_, **__: next(told))
    run = trained(evaluations=6, patience=2)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]


# ----------------------------------------------------------------------- ensembles and whole models


def test_members_of_an_ensemble_differ_and_their_disagreement_costs(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    run = trained(members=3, uncertainty_penalty=2.0)
    alone = [load_file(run.artifact / name / lora.WEIGHTS) for name in ("adapter", "adapter-1", "adapter-2")]
    assert not torch.equal(alone[0][lora.SCORE_KEY], alone[1][lora.SCORE_KEY])
    _, model = reward_model.load(
        run.artifact, loading.load(inputs["model"], device=tiny.CPU), device=tiny.CPU
    )
    batch = sequences.join([[5, 6], [7]], [[8, 1], [9, 4, 1]], pad_id=tiny.PAD, device=tiny.CPU)
    each = []
    for name in ("adapter", "adapter-1", "adapter-2"):  # as anybody would have them
        whole = AutoModelForSequenceClassification.from_pretrained(
            inputs["model"], num_labels=1, pad_token_id=tiny.PAD
        )
        plain = PeftModel.from_pretrained(whole, run.artifact / name).eval()
        with torch.no_grad():
            each.append(
                torch.stack([plain(torch.tensor([ids])).logits[0, 0] for ids in ([5, 6, 8, 1], [7, 9, 4, 1])])
            )
    apart = torch.tensor(reward_model.load_record(run.artifact)["apart"])
    rewards = (torch.stack(each) - apart[:, :1]) / apart[
        :, 1:
    ]  # pairs leave a member's origin and scale open
    torch.testing.assert_close(
        reward_model.rewards(model, batch),
        rewards.mean(0) - 2.0 * rewards.std(0, correction=0),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_member_learns_the_same_whoever_else_is_there(trained: Trained) -> None:
    alone, first = trained("alone"), trained("three", members=3)
    torch.testing.assert_close(
        *(load_file(run.artifact / "adapter" / lora.WEIGHTS)[lora.SCORE_KEY] for run in (alone, first)),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize("probe", [False, True])
def test_the_held_out_member_is_another_model_and_changes_nothing_of_the_others(
    trained: Trained, inputs: dict[str, Path], probe: bool
) -> None:
    alone, run = trained("alone", probe=probe), trained("two", probe=probe, held_out_member=True)
    weights = [load_file(one.artifact / "adapter" / lora.WEIGHTS) for one in (alone, run)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4)
    records = [reward_model.load_record(one.artifact) for one in (alone, run)]
    held_out = records[1].pop("held_out")
    assert set(records[1]) == set(records[0])
    assert records[1]["members"] == len(records[1]["apart"]) == 1
    assert records[1]["mean"] == pytest.approx(records[0]["mean"], abs=1e-4)

    base = loading.load(inputs["model"], device=tiny.CPU)
    base, scorer = reward_model.load(run.artifact, base, device=tiny.CPU)
    _, spare = reward_model.load_held_out(run.artifact, base, device=tiny.CPU)
    assert spare is not None
    assert (spare.mean, spare.std) == (held_out["mean"], held_out["std"])
    probes = records[1]["probes"]
    batch = sequences.join(
        [one["prompt"] for one in probes], [one["answer"] for one in probes], pad_id=tiny.PAD, device=tiny.CPU
    )
    rewards, others = (reward_model.rewards(one, batch) for one in (scorer, spare))
    torch.testing.assert_close(rewards, torch.tensor([one["score"] for one in probes]), atol=1e-5, rtol=1e-5)
    assert (rewards - others).abs().min() > 1e-4
    assert len(list(run.artifact.glob("adapter*"))) == 2


def test_without_a_held_out_member_there_is_none(trained: Trained, inputs: dict[str, Path]) -> None:
    base = loading.load(inputs["model"], device=tiny.CPU)
    run = trained(members=2)
    assert reward_model.load_held_out(run.artifact, base, device=tiny.CPU) == (base, None)


def test_every_weight_can_be_trained(trained: Trained, inputs: dict[str, Path]) -> None:
    run = trained(tune="full", learning_rate=1e-3, max_steps=20)
    assert lines(run)[-1]["held_out_loss"] < 0.5
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs["model"], run.artifact / "model")
    )
    assert not any(torch.equal(before[name], after[name]) for name in before)
    record = reward_model.load_record(run.artifact)
    base = loading.load(inputs["model"], device=tiny.CPU)
    _, model = reward_model.load(run.artifact, base, device=tiny.CPU)
    batch = sequences.join(
        [p["prompt"] for p in record["probes"]],
        [p["answer"] for p in record["probes"]],
        pad_id=tiny.PAD,
        device=tiny.CPU,
    )
    torch.testing.assert_close(
        reward_model.rewards(model, batch),
        torch.tensor([p["score"] for p in record["probes"]]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_training_can_start_from_weights_of_before(trained: Trained, inputs: dict[str, Path]) -> None:
    first = trained("first", max_steps=20)
    inputs["start"] = first.artifact / "adapter"
    try:
        second = trained("second", max_steps=1, learning_rate=1e-9)
    finally:
        del inputs["start"]
    assert lines(second)[-1]["held_out_loss"] == pytest.approx(lines(first)[-1]["held_out_loss"], abs=1e-4)


# --------------------------------------------------------------------------- what it says of itself


def held_out(right: int, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return metrics and warnings of a model that orders ``right`` of 100 pairs as the votes do.

    The longer answer always wins, the older never.
    """
    questions = [Comparison(i, [5], [[6, 7, 1], [6, 1]], [(0, 1)], [1.0], [False]) for i in range(100)]
    rewards = torch.tensor([[1.0, 0.0] if i < right else [0.0, 1.0] for i in range(100)]).flatten()
    run, pairs = (
        Run(tiny.write_job(tmp_path / "run", "reward", {}, {})),
        reward_evaluation.pairs_of(questions),
    )
    calibrated = reward_evaluation.calibrate(pairs, rewards)
    metrics = reward_report.report_accuracy(
        pairs,
        rewards,
        run,
        age_bias=0.0,
        baseline=reward_evaluation.fit_baseline_rules(pairs),
        calibrated=calibrated,
    )
    return metrics, run.warnings


@pytest.mark.parametrize(("right", "warned"), [(59, True), (62, False)])
def test_a_reward_model_that_may_be_guessing_is_warned_of(tmp_path: Path, right: int, warned: bool) -> None:
    metrics, warnings = held_out(right, tmp_path)
    assert any("not distinguishable from guessing" in warning for warning in warnings) == warned
    assert metrics["reward_accuracy.votes"]["value"] == pytest.approx(right / 100)


def test_a_reward_model_that_a_rule_of_thumb_beats_is_warned_of(tmp_path: Path) -> None:
    metrics, warnings = held_out(70, tmp_path)
    assert any('worse than the rule "the longer answer wins"' in warning for warning in warnings)
    assert not any("the older" in warning for warning in warnings)
    assert (
        metrics["reward_accuracy.longer_wins"]["value"],
        metrics["reward_accuracy.older_wins"]["value"],
    ) == (1, 0)
    assert (
        metrics["reward_accuracy.over_longer_wins"]["high"]
        < 0
        < metrics["reward_accuracy.over_older_wins"]["low"]
    )
    measured = json.loads((tmp_path / "run" / "artifact" / "measures.json").read_text())
    assert measured["accuracy"]["longer_chosen"]["n"] == 100
    assert measured["calibration"]["reliability"][0]["accuracy"]["n"] > 0


def test_attacks_on_the_finished_model_are_reported(trained: Trained) -> None:
    run = trained(max_steps=1)
    found = json.loads((run.artifact / "measures.json").read_text())["attacks"]
    assert {"empty", "long_fences", "one_token", "echo", "truncated"} <= set(found)
    fooled = reward_model.load_record(run.artifact)["fooled"]
    assert fooled == [name for name, verdict in found.items() if verdict["failed"]]
    assert any("fooled" in warning for warning in summary(run)["warnings"]) == bool(fooled)


def test_a_wrong_name_is_measured_beside_the_attacks(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted rewards: the first copy is better than its answer, the second equal, the others worse."""
    honest = reward_tests.reference_rewards
    seen: list[tuple[list[int], list[int]]] = []

    def plant(model: Any, answers: Any, *rest: Any, phase: str, **more: Any) -> Tensor:
        if phase != "answers with a wrong name":
            return honest(model, answers, *rest, phase=phase, **more)
        seen.extend(answers)
        rewards = torch.zeros(len(answers))
        rewards[len(answers) // 2 :] = -1.0
        rewards[len(answers) // 2 : len(answers) // 2 + 2] = torch.tensor([1.0, 0.0])
        return rewards

    monkeypatch.setattr(reward_tests, "reference_rewards", plant)
    run = trained(max_steps=1)
    count, measures = len(seen) // 2, json.loads((run.artifact / "measures.json").read_text())
    assert 20 < count <= 40
    for (prompt, real), (same, wrong) in zip(seen[:count], seen[count:], strict=True):
        assert prompt == same
        assert real != wrong
        assert wrong[-1] == real[-1] == tiny.EOS
    metric = summary(run)["metrics"]["reward.wrong_name"]
    assert metric == wilson(1.5, count)._asdict()
    assert measures["copying"]["wrong_name"]["wins"] == metric
    assert measures["copying"]["wrong_name"]["margin"]["value"] == pytest.approx((1 - (count - 2)) / count)
    assert "wrong_name" not in measures["attacks"]  # gates and warnings are about these
    worst = max(verdict["wins"]["value"] for verdict in measures["attacks"].values())
    assert summary(run)["metrics"]["reward.worst_attack"]["value"] == worst


def test_no_wrong_name_is_measured_if_no_answer_copies_one(trained: Trained, inputs: dict[str, Path]) -> None:
    whole = dict(inputs)
    try:
        inputs["data"] = shutil.copytree(whole["data"], inputs["model"].parent / "speechless")
        path = inputs["data"] / "finetune.parquet"
        rows = [row | {"answer": "yes"} for row in pq.read_table(path).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), path)
        run = trained("speechless", max_steps=1)
    finally:
        inputs["data"] = whole["data"]
    assert "reward.wrong_name" not in summary(run)["metrics"]
    assert "copying" not in json.loads((run.artifact / "measures.json").read_text())


def test_made_comparisons_are_trained_on_and_not_measured_on(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate of nearly 0 the model stays what it is, so all figures of real pairs are equal."""
    fitted: list[int] = []
    honest = reward_evaluation.fit_baseline_rules

    def fit(pairs: reward_evaluation.Pairs) -> Tensor:
        fitted.append(len(pairs.question))
        return honest(pairs)

    monkeypatch.setattr(reward_evaluation, "fit_baseline_rules", fit)
    plain = trained("plain", learning_rate=1e-12, age_bias=True)
    hard = trained("hard", learning_rate=1e-12, age_bias=True, hard_negatives={"share": 2})
    told, other = summary(plain), summary(hard)
    made = other["metrics"].pop("reward.made_comparisons")
    assert made == other["pairs"] - told["pairs"] > told["questions"]
    measures = json.loads((hard.artifact / "measures.json").read_text())
    assert sum(measures["made"].values()) == made
    assert "reward.made_comparisons" not in told["metrics"]
    assert (told["questions"], told["measured"]) == (other["questions"], other["measured"])
    for name, figure in told["metrics"].items():
        if name.startswith(("reward_accuracy", "reward.held_out_loss")):
            assert other["metrics"][name] == pytest.approx(figure, rel=1e-6), name
    assert lines(plain)[0]["loss"] != lines(hard)[0]["loss"]
    assert fitted == [told["pairs"]] * 2  # rules of thumb are about votes


def test_a_kind_of_which_none_can_be_made_is_warned_of(trained: Trained) -> None:
    kinds = {"share": 1, "kinds": ["repeated", "truncated"]}
    run = trained(max_steps=1, hard_negatives=kinds, text={"max_prompt_tokens": 48, "max_answer_tokens": 12})
    [warning] = [text for text in summary(run)["warnings"] if "hard_negatives" in text]
    assert warning.startswith("No comparison of these kinds could be made: repeated (reward.hard_negatives).")


def test_what_is_reported_is_of_questions_that_neither_trained_nor_chose(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    """Swapping the sides of the evaluation pairs inverts the accuracies, and changes nothing that chose the
    weights.
    """
    plain = trained("plain", max_steps=8)
    table = pq.read_table(inputs["data"] / "evaluation_pairs.parquet")
    swapped = table.rename_columns({"chosen": "rejected", "rejected": "chosen"}).select(table.column_names)
    whole = dict(inputs)
    try:
        inputs["data"] = shutil.copytree(whole["data"], plain.directory / "swapped")
        pq.write_table(swapped, inputs["data"] / "evaluation_pairs.parquet")
        turned = trained("turned", max_steps=8)
    finally:
        inputs["data"] = whole["data"]
    told, other = summary(plain), summary(turned)
    assert told["measured"] == other["measured"] == {"split": "evaluation", "questions": 20, "pairs": 40}
    assert other["metrics"]["reward_accuracy.votes"]["value"] == pytest.approx(
        1 - told["metrics"]["reward_accuracy.votes"]["value"]
    )
    for name in ("reward.held_out_loss", "reward.best_step", "reward.mean", "reward.temperature"):
        assert other["metrics"].get(name) == told["metrics"].get(name)
    assert (plain.artifact / "adapter" / lora.WEIGHTS).read_bytes() == (
        turned.artifact / "adapter" / lora.WEIGHTS
    ).read_bytes()


@pytest.mark.parametrize(("left", "split"), [(0, "held-out"), (5, "held-out"), (12, "evaluation")])
def test_too_few_evaluation_questions_are_warned_of_and_what_is_used_instead(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path, left: int, split: str
) -> None:
    whole = dict(inputs)
    try:
        inputs["data"] = shutil.copytree(whole["data"], tmp_path / "fewer")
        few = pq.read_table(whole["data"] / "evaluation_pairs.parquet").slice(0, 2 * left)
        pq.write_table(few, inputs["data"] / "evaluation_pairs.parquet")
        run = trained("few", max_steps=1)
    finally:
        inputs["data"] = whole["data"]
    told = summary(run)
    assert told["measured"]["split"] == split
    assert any(f"have pairs: {left}" in sentence for sentence in told["warnings"])
    assert told["metrics"]["reward_accuracy.votes"]["n"] == told["measured"]["pairs"]
    assert json.loads((run.artifact / "measures.json").read_text())["measured"] == told["measured"]


def test_only_as_many_answers_are_attacked_as_are_set_and_they_are_drawn(trained: Trained) -> None:
    few, all_of_them = trained("few", max_steps=1, red_team_answers=7), trained("all", max_steps=1)
    found = [json.loads((run.artifact / "measures.json").read_text()) for run in (few, all_of_them)]
    assert [measured["attacks"]["echo"]["wins"]["n"] for measured in found] == [7, 40]
    assert found[1]["elsewhere"]["n"] == 40
    assert (
        summary(all_of_them)["metrics"]["reward.elsewhere_correlation"]["value"]
        == found[1]["elsewhere"]["value"]
    )
    assert (
        reward_model.load_record(few.artifact)["mean"]
        == reward_model.load_record(all_of_them.artifact)["mean"]
    )


def test_the_calibration_is_of_other_questions_than_its_temperature() -> None:
    """Fitted on margins twice as large as those that it is evaluated on."""
    questions = [Comparison(i, [5], [[6, 7, 1], [6, 1]], [(0, 1)], [1.0], [False]) for i in range(100)]
    rewards = torch.tensor([[1.0, 0.0] if i < 75 else [0.0, 1.0] for i in range(100)]).flatten()
    pairs = reward_evaluation.pairs_of(questions)
    found = reward_evaluation.calibrate(
        pairs, rewards, fitted_on=2 * reward_evaluation.margins(pairs, rewards)
    )
    assert (found.temperature, found.n, found.reason) == (pytest.approx(2 / math.log(3)), 100, "")
    assert found.after == pytest.approx(0.75 - 1 / (1 + math.exp(-math.log(3) / 2)))
    assert 0.02 < found.floor < 0.06


def test_a_temperature_without_a_best_value_is_not_fitted_and_says_why(tmp_path: Path) -> None:
    metrics, warnings = held_out(100, tmp_path)
    assert "reward.temperature" not in metrics
    assert metrics["reward.ece"] == metrics["reward.ece_uncalibrated"]
    assert any(
        "No temperature was fitted" in sentence and "every held-out pair is ordered" in sentence
        for sentence in warnings
    )
    assert reward_model.load_record(tmp_path / "run" / "artifact")["temperature"] == 1.0


def test_a_model_whose_rewards_are_all_equal_is_never_right(tmp_path: Path) -> None:
    questions = [Comparison(i, [5], [[6, 7, 1], [6, 1]], [(0, 1)], [1.0], [None]) for i in range(30)]
    pairs = reward_evaluation.pairs_of(questions)
    found = reward_evaluation.accuracies(pairs, torch.ones(60))
    assert found["votes"].wilson.value == 0
    assert reward_evaluation.calibrate(pairs, torch.ones(60)).reason == "no two rewards differ"


def evaluation_ids(inputs: dict[str, Path]) -> set[int]:
    return set(pq.read_table(inputs["data"] / "evaluation_pairs.parquet")["question_id"].to_pylist())


def test_rewards_of_evaluation_answers_that_are_no_numbers_end_in_one_sentence(
    trained: Trained, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, asked = reward.answer_rewards, evaluation_ids(inputs)

    def overflowing(
        model: reward_model.Scorer, questions: list[Comparison], *rest: Any, **more: Any
    ) -> Tensor:
        found = honest(model, questions, *rest, **more)
        return found * torch.nan if questions[0].question_id in asked else found

    monkeypatch.setattr(reward, "answer_rewards", overflowing)
    with pytest.raises(InputError, match=r"^The reward of evaluation answers is nan"):
        trained(max_steps=1)


def test_rewards_of_attacks_that_are_no_numbers_end_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny.write_job(tmp_path / "run", "reward", {}, {}))
    monkeypatch.setattr(
        reward_model, "rewards", lambda _, batch: torch.full((len(batch.input_ids),), torch.inf)
    )
    with pytest.raises(InputError, match=r"^The reward of attacks is inf"):
        reward_tests.reference_rewards(
            reward_model.Scorer((), 0.0), [([5], [6, 1])], tiny.PAD, tiny.CPU, run=run, phase="attacks"
        )


def test_shared_prompts_are_checked_on_evaluation_questions_too(
    trained: Trained, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    monkeypatch.setattr(
        training_setup,
        "check_prompt_sharing",
        lambda _run, _base, *parts, **_: seen.update(c.question_id for c in chain(*parts)),
    )
    trained(max_steps=1)
    assert evaluation_ids(inputs) <= seen
