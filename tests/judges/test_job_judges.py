"""Test that the judge that a job names is made with the job's settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.config.jobs import RewardJob, WinrateJob
from tasks.config.judge_prompts import find_template, read_template
from tasks.config.pipeline import Pipeline
from tasks.config.sections.judges import EndpointJudge, LocalJudge
from tasks.judges.endpoint_judge import EndpointJudge as EndpointModelJudge
from tasks.judges.judge import Answer, Battle, Judge
from tasks.judges.language_model_judge import LanguageModelJudge
from tasks.judges.scoring_judge import ScoringJudge
from tasks.judges.text_judge import TextJudge
from tasks.programs import reward
from tasks.programs.runtime import job_judges, pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import loading
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.judges.chat_server import KEY, serving

ENDPOINT = EndpointJudge(
    model="judge-1", prompt="rubric", temperature=0.5, max_reply_tokens=33, max_prompt_characters=999,
    prompt_price=3, reply_price=4, max_cost=6, requests_per_minute=600, concurrency=7, timeout=8, patience=9,
    num_questions=10, num_graded_pairs=11,
)  # fmt: skip


def load(
    folder: Path, settings: Any, monkeypatch: pytest.MonkeyPatch, **inputs: Path
) -> tuple[list[Judge], WinrateJob]:
    """Return the judges of a job without the reward model."""
    monkeypatch.setattr(job_judges, "load_reward_judges", lambda *_: [])
    job = WinrateJob.of(Pipeline(judge=settings))
    record = {"stage": "winrate", "job": {}, "inputs": {name: str(path) for name, path in inputs.items()}}
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(record))
    found = job_judges.load_judges(job, Run(folder), None, torch.device("cpu"))  # type: ignore[arg-type]
    return found, job


def test_an_endpoint_judge_has_all_its_settings_and_its_replies_in_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    with serving() as server:
        monkeypatch.setenv("ALIGNFLOW_JUDGE_URL", server.url)
        monkeypatch.setenv("ALIGNFLOW_JUDGE_KEY", KEY)
        judges, job = load(tmp_path / "run", ENDPOINT, monkeypatch, prompt=find_template("rubric"))
        gold, judge = judges
        assert isinstance(judge, EndpointModelJudge)
        for name in (
            "model", "temperature", "max_reply_tokens", "max_prompt_characters", "concurrency",
            "prompt_price", "reply_price", "max_cost",
        ):  # fmt: skip
            assert getattr(judge.settings, name) == getattr(ENDPOINT, name)
        assert judge.settings.template == read_template(find_template("rubric"))
        assert judge._limits == (600, 8, 9)
        assert job_judges.limits(judge, job) == (10, 11)
        assert job_judges.limits(gold, job) == (job.winrate.num_questions, job.winrate.num_graded_pairs)
        battle = Battle("q", Answer("a"), Answer("b"))
        assert judge.compare([battle], lambda done, total: None) == ["first"]
        judge.cache.close()
    assert (tmp_path / "home" / "verdicts.db").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_an_endpoint_judge_needs_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNFLOW_JUDGE_URL", raising=False)
    monkeypatch.setenv("ALIGNFLOW_JUDGE_KEY", KEY)
    with pytest.raises(InputError, match=r"^ALIGNFLOW_JUDGE_URL must be set where the judge's stage runs"):
        load(tmp_path / "run", ENDPOINT, monkeypatch, prompt=find_template("dpo"))


@pytest.mark.parametrize(("answer_by", "kind"), [("label", LanguageModelJudge), ("text", TextJudge)])
def test_a_local_judge_answers_as_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer_by: Any, kind: type
) -> None:
    folder = tiny.base_folder(tmp_path / "model")
    settings = LocalJudge(path=str(folder), answer_by=answer_by, max_reply_tokens=17, batch_size=3)
    judges, job = load(tmp_path / "run", settings, monkeypatch, judge=folder, prompt=find_template("quality"))
    assert isinstance(judges[1], kind)
    assert isinstance(judges[1], LanguageModelJudge | TextJudge)
    assert judges[1].settings.batch_size == 3
    assert job_judges.limits(judges[1], job) == (settings.num_questions, settings.num_graded_pairs)
    if isinstance(judges[1], TextJudge):
        assert judges[1].settings.max_reply_tokens == 17


@pytest.mark.parametrize("has_held_out", [False, True])
def test_the_held_out_reward_model_judges_before_the_one_that_ppo_was_trained_with(
    tmp_path: Path, has_held_out: bool
) -> None:
    data, model = tiny.data_folder(tmp_path / "data", 24), tiny.base_folder(tmp_path / "model")
    settings = {"lora": {"rank": 2, "alpha": 8.0}, "max_steps": 2, "held_out_member": has_held_out}
    text = {"max_prompt_tokens": 48, "max_answer_tokens": 24}
    record = {"seed": 0, "text": text, "reward": settings}
    trained = Run(tiny.write_job(tmp_path / "reward", "reward", record, {"data": data, "model": model}))
    reward.train(RewardJob.model_validate(trained.record), trained)
    job = WinrateJob.of(Pipeline.model_validate({"text": text}))
    run = Run(tiny.write_job(tmp_path / "run", "winrate", {}, {"model": model, "reward": trained.artifact}))
    encoder = pair_tables.build_encoder(job.text, loading.load_tokenizer(model), {})
    judges = job_judges.load_judges(job, run, encoder, tiny.CPU)
    assert [one.name for one in judges] == ["gold", *["held_out"] * has_held_out, "reward"]
    scores = [
        one.scores([("Why?", Answer("Because."))], lambda done, total: None)
        for one in judges[1:]
        if isinstance(one, ScoringJudge)
    ]
    assert len({score for (score,) in scores}) == len(judges) - 1, "each is a model of its own"
