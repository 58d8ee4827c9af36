"""Test the independent score of PPO: it changes no draw, sees over-optimisation, and a cut run is whole."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from tasks.config.jobs import PpoJob
from tasks.config.pipeline import Pipeline
from tasks.demo_site.gold import gold_score
from tasks.demo_site.shell_tasks import SLOTS, TASKS, fill_slots
from tasks.programs import ppo
from tasks.programs.ppo_stage import independent_score
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.models import loading, reward_model
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training.rollouts import Rollout
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs

EVERY_STEP = {"checkpoint_steps": 10}  # PPO saves ten times as often as the other stages
SCORE = {"by": "held_out", "every": 2, "prompts": 16, "best_of": 4}
HELD_OUT = 77.0  # marks the planted scorer
HACK: dict[str, Any] = {
    "steps": 16, "rollouts": 32, "minibatch": 16, "learning_rate": 2e-2, "kl_coefficient": 0.0,
    "missing_eos": "add", "missing_eos_reward": 0.0, "text_alarm": None, "spike_alarm": None,
    "kl_budget_per_token": None, "on_alarm": "warn", "score": SCORE,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("scores"), held_out_member=True)


def scores_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "scores.json").read_text())
    return found


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


def summary(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    return found


def test_the_training_is_the_same_however_often_the_policy_is_scored(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    often = ppo_jobs.write_run(tmp_path / "often", inputs, steps=4, keep="final", score=SCORE | {"every": 1})
    ppo.train(*often)
    rarely = SCORE | {"every": 100, "best_of": 1}
    seldom = ppo_jobs.write_run(tmp_path / "seldom", inputs, steps=4, keep="final", score=rarely)
    ppo.train(*seldom)
    ppo_jobs.assert_same_weights(often[1], seldom[1])
    points = scores_of(often[1])["points"]
    assert [point["step"] for point in points] == [0, 1, 2, 3, 4]
    assert scores_of(seldom[1])["points"] == [points[0], points[4]]
    logged = [line.get("independent_score") for line in lines(often[1])]
    assert logged == [point["independent_score"] for point in points[:4]], "each of the weights that sampled"
    assert points[0]["score_kl"] == pytest.approx(0, abs=1e-5)
    best_of = scores_of(often[1])["best_of_n"]
    assert [one["n"] for one in best_of] == [1, 2, 4]
    assert best_of[0]["reward"] < best_of[1]["reward"] < best_of[2]["reward"]
    final = summary(often[1])["ppo.independent_score.final"]
    assert (final["value"], final["n"]) == (points[4]["independent_score"], 16)


def test_ppo_does_not_learn_from_the_prompts_of_the_score(inputs: dict[str, Path], tmp_path: Path) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs, score=SCORE)
    encoder = pair_tables.build_encoder(job.text, loading.load_tokenizer(inputs["model"]), {})
    prompts, held_out = ppo.read_questions(job, run, encoder)
    learnt = [prompt.question for prompt in prompts]
    assert [prompt.ids for prompt in prompts] == [encoder.encode_prompt(text) for text in learnt]
    everything = pq.read_table(inputs["data"] / "rl.parquet")["prompt"].to_pylist()
    assert (len(learnt), len(held_out)) == (len(everything) - 16, 16)
    assert sorted(learnt + [text for _, text in held_out]) == sorted(everything)


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reward model pay for length, which the held-out one dislikes."""

    def score(scorer: Scorer, batch: Sequences) -> Tensor:
        paid = batch.response_mask.sum(dim=1) / 10 - 2
        return -paid if scorer.mean == HELD_OUT else paid

    honest = reward_model.load_held_out

    def marked(*args: Any, **kwargs: Any) -> Any:
        base, scorer = honest(*args, **kwargs)
        return base, scorer._replace(mean=HELD_OUT)

    monkeypatch.setattr(reward_model, "normalised_rewards", score)
    monkeypatch.setattr(reward_model, "load_held_out", marked)


def test_over_optimisation_is_stopped_at_the_best_score(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    free = ppo_jobs.write_run(tmp_path / "free", inputs, **HACK | {"keep": "final"})
    ppo.train(*free)
    held = ppo_jobs.write_run(tmp_path / "held", inputs, **HACK | {"on_alarm": "stop"})
    ppo.train(*held)
    assert len(lines(free[1])) == 16
    assert len(lines(held[1])) < 16
    assert lines(held[1])[-1]["alarm"] == 4
    found = summary(held[1])
    assert found["ppo.kept_step"] == found["ppo.best_step"] < len(lines(held[1]))
    best, final = found["ppo.independent_score.best"], found["ppo.independent_score.final"]
    assert final["high"] < best["low"], "the last measurement is of what was left"
    (sentence,) = held[1].warnings[-1:]
    assert "the independent score has fallen" in sentence or "the reward has risen" in sentence
    assert f"the policy is {'that of step' if found['ppo.best_step'] else 'the SFT model'}" in sentence
    assert "ppo.keep=best hands on the best ones" in free[1].warnings[-1]


def test_the_last_weights_are_handed_on_unless_they_are_far_below_the_best(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ppo_jobs.write_run(tmp_path / "plain", inputs, steps=3, score=SCORE | {"every": 1})
    ppo.train(*plain)
    assert summary(plain[1])["ppo.kept_step"] == 3
    plant(monkeypatch)
    hacked = ppo_jobs.write_run(tmp_path / "hacked", inputs, **HACK)
    ppo.train(*hacked)
    found = summary(hacked[1])
    assert found["ppo.kept_step"] == found["ppo.best_step"] < 16
    assert f"The policy is that of step {found['ppo.kept_step']}." in hacked[1].warnings[-1]
    best = next(line for line in lines(hacked[1]) if line["step"] == found["ppo.best_step"] + 1)
    assert found["ppo.rollout_kl"] == best["kl"], "the figures are those of the weights handed on"


class Killed(Exception):
    pass


def test_a_run_that_rolls_back_is_the_same_if_it_is_cut(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    settings = HACK | {"on_alarm": "roll_back", "steps": 14}
    whole = ppo_jobs.write_run(tmp_path / "whole", inputs, machine=EVERY_STEP, **settings)
    ppo.train(*whole)
    alarms = scores_of(whole[1])["alarms"]
    assert alarms[0]["action"] == "roll_back"
    raised = [line["kl_coefficient"] for line in lines(whole[1])]
    assert raised[alarms[0]["step"] - 1] == 0.05, "from 0"
    assert len(alarms) == 1 or raised[alarms[1]["step"] - 1] == 0.1
    cut = ppo_jobs.write_run(tmp_path / "cut", inputs, machine=EVERY_STEP, **settings)
    first = alarms[0]["step"]
    for at in (first - 1, first, first + 1):
        cut_in_step(at, cut, monkeypatch)
    ppo.train(*cut)
    ppo_jobs.assert_same_weights(whole[1], cut[1])
    for name in ("metrics.jsonl", "scores.json", "summary.json"):
        assert (whole[1].artifact / name).read_bytes() == (cut[1].artifact / name).read_bytes()


def cut_in_step(number: int, run: tuple[PpoJob, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, from the last checkpoint on, until the step of this number has sampled its answers."""
    honest = ppo.describe_rollout
    path = run[1].directory / "metrics.jsonl"

    def num_taken() -> int:
        text = path.read_text() if path.exists() else ""
        return sum("phase" not in json.loads(line) for line in text.splitlines())

    def die(*args: Any, **kwargs: Any) -> Any:
        if num_taken() == number - 1:
            raise Killed
        return honest(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(ppo, "describe_rollout", die)
        with pytest.raises(Killed):
            ppo.train(*run)


def test_a_policy_is_rolled_back_three_times_at_most(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        independent_score.Measurement,
        "score",
        property(lambda self: independent_score.mean_interval([0.0] * 8)),
    )
    monkeypatch.setattr("tasks.programs.ppo_stage.plateau.describe_fall", lambda *_: "it has fallen")
    run = ppo_jobs.write_run(
        tmp_path / "run", inputs, steps=12, on_alarm="roll_back", score=SCORE | {"every": 1}
    )
    ppo.train(*run)
    alarms = scores_of(run[1])["alarms"]
    assert [alarm["action"] for alarm in alarms] == ["roll_back"] * 3 + ["stop"]
    assert [line["kl_coefficient"] for line in lines(run[1]) if "alarm" in line] == [0.1, 0.2, 0.4, 0.4]
    assert len(run[1].warnings) >= 2


def test_a_score_that_there_is_none_of_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    gold = ppo_jobs.write_run(tmp_path / "gold", inputs, score=SCORE | {"by": "gold"})
    with pytest.raises(InputError, match="built-in site's questions only"):
        ppo.train(*gold)
    many = ppo_jobs.write_run(tmp_path / "many", inputs, score=SCORE | {"prompts": 21})
    with pytest.raises(InputError, match="less than half of the 40 prompts"):
        ppo.train(*many)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ppo": {"score": {"by": "held_out"}}}, "reward.held_out_member to true"),
        (
            {"ppo": {"score": {"by": "gold"}}, "source": {"kind": "own", "path": "x.jsonl"}},
            "built-in site only",
        ),
    ],
)
def test_a_pipeline_without_such_a_score_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pipeline.model_validate(settings)
    assert Pipeline.model_validate(settings | {"method": "dpo"})


def test_gold_scores_are_those_of_the_answers_texts(inputs: dict[str, Path]) -> None:
    tokenizer = loading.load_tokenizer(inputs["model"])
    encoder = pair_tables.build_encoder(Pipeline().text, tokenizer, {})
    slots = {name: values[0] for name, values in SLOTS.items()}
    question = fill_slots(TASKS[0].questions[0], slots)
    answers = [f"`{fill_slots(TASKS[0].commands[0], slots)}`", "Did you try google?"]
    ids = [encoder.encode_answer(text) for text in answers]
    batch = sequences.join([encoder.encode_prompt(question)] * 2, ids, pad_id=0, device=torch.device("cpu"))
    rollout = Rollout(batch, *[None] * 6)  # type: ignore[arg-type]
    found = independent_score.gold_scores(encoder, [(1, question)])(rollout, [question] * 2)
    assert found == [gold_score(question, text) for text in answers]
    assert found[0] > 0 > found[1]
