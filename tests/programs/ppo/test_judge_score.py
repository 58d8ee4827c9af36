"""Test a language model as PPO's independent score: refused at the start, and paid once over any cut."""

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from tasks.config.jobs import PpoJob
from tasks.programs import ppo
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs
from tests.support import tiny
from tests.support.judges.chat_server import KEY, Answer, serving

SCORE = {"by": "judge", "every": 2, "prompts": 16, "best_of": 4}
PPO: dict[str, Any] = {
    "lora": ppo_jobs.LORA, "steps": 6, "rollouts": 8, "minibatch": 4, "epochs": 2, "learning_rate": 2e-2,
    "text_alarm": None, "spike_alarm": None, "kl_budget_per_token": None, "score": SCORE,
}  # fmt: skip
JUDGE: dict[str, Any] = {
    "kind": "endpoint", "model": "judge-1", "prompt_price": 1.0, "reply_price": 1.0, "timeout": 5.0,
    "patience": 0.5,
}  # fmt: skip
TEMPLATE = "{question}\n{first}\n{second}\nBetter:"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("judged")
    (root / "prompt.txt").write_text(TEMPLATE)
    return ppo_jobs.write_inputs(root) | {
        "prompt": root / "prompt.txt", "judge": tiny.base_folder(root / "judge"),
    }  # fmt: skip


def write_run(
    folder: Path, inputs: dict[str, Path], judge: dict[str, Any] | None = None, **changed: Any
) -> tuple[PpoJob, Run]:
    """Write a job that is scored by a judge, and keeps a checkpoint of every step."""
    record = {"seed": 0, "text": ppo_jobs.TEXT, "ppo": PPO | changed, "judge": judge or JUDGE}
    run = Run(tiny.write_job(folder, "ppo", record, inputs, checkpoint_steps=10))
    return PpoJob.model_validate(run.record), run


def use(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    monkeypatch.setenv("ALIGNFLOW_JUDGE_URL", url)
    monkeypatch.setenv("ALIGNFLOW_JUDGE_KEY", KEY)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))


def decide(prompt: str, before: int) -> Answer:
    """Answer by the prompt: A, B, or in one of eight cases no verdict."""
    number = crc32(prompt.encode()) % 8
    return Answer(text="Better: " + ("?" if number == 0 else "AB"[number % 2]))


def files_of(run: Run) -> dict[str, bytes]:
    names = ("metrics.jsonl", "scores.json", "summary.json")
    return {name: (run.artifact / name).read_bytes() for name in names}


def test_a_run_that_loses_its_judge_and_is_cut_ends_with_the_same_bytes_and_asks_nothing_twice(
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(decide) as server:
        use(monkeypatch, server.url, tmp_path / "home")
        whole = write_run(tmp_path / "whole", inputs)
        ppo.train(*whole)
        asked = set(server.asked)
        assert set(server.asked.values()) == {1}
    assert "16 prompts, 4 times, in both orders, so at most 128 verdicts" in capsys.readouterr().out
    scores = json.loads((whole[1].artifact / "scores.json").read_text())
    assert [point["step"] for point in scores["points"]] == [0, 2, 4, 6]
    assert scores["points"][0]["independent_score"] == 0.5, "the SFT model against itself"
    assert len({point["independent_score"] for point in scores["points"]}) > 2
    assert [sorted(one) for one in scores["best_of_n"]] == [
        ["independent_score", "kl", "n", "reward"], ["kl", "n", "reward"],
        ["independent_score", "kl", "n", "reward"],
    ]  # fmt: skip
    assert any("count as ties" in sentence for sentence in whole[1].warnings)

    # The judge dies in the measurement after step 4; the run is cut between it and the checkpoint.
    cut = write_run(tmp_path / "cut", inputs)
    known: set[str] = set()
    limit = len(asked) * 2 // 3

    def dies(prompt: str, before: int) -> Answer:
        known.add(prompt)
        return decide(prompt, before) if len(known) <= limit else Answer(status=503)

    with serving(dies) as server:
        use(monkeypatch, server.url, tmp_path / "cut-home")
        with pytest.raises(InputError, match=r"replies are kept, so the same command goes on from them"):
            ppo.train(*cut)
        port = server.server.server_port
        kept = set(+server.paid)
    assert 0 < cut[1].last()["step"] < 6, "in mid-training"
    with serving(decide, port=port) as server:
        honest = ppo.estimate_advantages

        def killed(*args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(ppo, "estimate_advantages", killed)
        with pytest.raises(KeyboardInterrupt):
            ppo.train(*write_again(cut[1]))
        monkeypatch.setattr(ppo, "estimate_advantages", honest)
        ppo.train(*(again := write_again(cut[1])))
        assert set(server.asked.values()) == {1}
        assert not set(server.asked) & kept
        assert set(server.asked) | kept == asked
    ppo_jobs.assert_same_weights(whole[1], again[1])
    assert files_of(again[1]) == files_of(whole[1])


def write_again(run: Run) -> tuple[PpoJob, Run]:
    """Open a run's folder as a new process does."""
    opened = Run(run.directory)
    return PpoJob.model_validate(opened.record), opened


def test_a_judge_that_cannot_be_reached_ends_the_program_before_its_first_step(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as server:
        dead = server.url
    use(monkeypatch, dead, tmp_path / "home")
    _, run = write_run(tmp_path / "run", inputs, score=SCORE | {"best_of": 1})
    process = tiny.start_program("ppo", run.directory)
    assert process.wait(900) == 2
    error = json.loads((run.directory / "error.json").read_text())
    assert error["input"]
    assert error["message"].startswith("The judge's endpoint did not answer a request for 0.5 s")
    assert "\n" not in error["message"]
    assert not (run.directory / "metrics.jsonl").exists() or not (run.directory / "metrics.jsonl").read_text()


def test_verdicts_that_cost_too_much_end_the_program_before_its_first_step(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(decide) as server:
        use(monkeypatch, server.url, tmp_path / "home")
        job, run = write_run(tmp_path / "run", inputs, JUDGE | {"max_cost": 0.03})
        with pytest.raises(
            InputError, match=r"so at most 128 verdicts, .* judge\.max_cost is 0\.03: raise it"
        ):
            ppo.train(job, run)
        assert sum(server.asked.values()) == 2, "the trial alone"


def test_the_training_is_the_same_however_often_a_local_judge_is_asked(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    judge = {"kind": "local", "path": "unused"}
    runs = [
        write_run(tmp_path / str(every), inputs, judge, keep="final", score=SCORE | {"every": every}, steps=3)
        for every in (1, 100)
    ]
    for job, run in runs:
        ppo.train(job, run)
    ppo_jobs.assert_same_weights(runs[0][1], runs[1][1])
    often, seldom = (json.loads((run.artifact / "scores.json").read_text()) for _, run in runs)
    assert seldom["points"] == [often["points"][0], often["points"][3]]
    assert len({point["independent_score"] for point in often["points"]}) > 1
