"""Test the stage winrate with a judge behind `transformers serve`, through a proxy that fails.

Each verdict is delivered once. It is paid once more only if its reply was lost on the wire.
"""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.extras import missing_packages
from tasks.config.jobs import RewardJob
from tasks.judges.verdict_cache import VerdictCache
from tasks.programs import reward
from tasks.programs.runtime.program import Run
from tests.support import tiny
from tests.support.fake_programs import wait_until
from tests.support.forked import Forked
from tests.support.judges.chat_server import KEY
from tests.support.judges.fault_proxy import Fault, FaultProxy, faults
from tests.support.judges.transformers_server import NAME, TransformersServer, write_judge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(missing_packages("serve")), reason=f"not installed: {', '.join(missing_packages('serve'))}"
    ),
]
TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 12}
TEMPLATE = "{question}\n{first}\n{second}\nBetter:"
JUDGE: dict[str, Any] = {
    "kind": "endpoint", "model": NAME, "prompt": "own", "max_reply_tokens": 1, "prompt_price": 1.0,
    "reply_price": 1.0, "concurrency": 3, "timeout": 60.0, "patience": 120.0, "num_questions": 8,
    "num_graded_pairs": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return what the program reads: data, a model, its reward model, answers of two policies, a prompt."""
    root = tmp_path_factory.mktemp("judged")
    found = {"data": tiny.data_folder(root / "data", 24), "model": tiny.base_folder(root / "base")}
    settings = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 1}
    scored = Run(
        tiny.write_job(root / "reward", "reward", {"seed": 0, "text": TEXT, "reward": settings}, found)
    )
    reward.train(RewardJob.model_validate(scored.record), scored)
    write_answers(root / "answers", found["data"])
    (root / "prompt.txt").write_text(TEMPLATE)
    return found | {
        "reward": scored.artifact,
        "answers": root / "answers",
        "prompt": root / "prompt.txt",
    }


def write_answers(folder: Path, data: Path) -> None:
    """Write the table of the stage answers: SFT repeats one voted answer, PPO another."""
    rows = [
        {
            "question_id": row["question_id"], "question": row["prompt"],
            "sft.answer": row["answers"][1], "sft.tokens": [5, tiny.EOS],
            "ppo.answer": f"{row['answers'][0]} {number}", "ppo.tokens": [6, tiny.EOS],
        }
        for number, row in enumerate(pq.read_table(data / "evaluation.parquet").to_pylist())
    ]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers.parquet")


@pytest.fixture(scope="module")
def server(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersServer]:
    """Serve a judge that says A to some of the prompts."""
    folder = tmp_path_factory.mktemp("server") / NAME
    pairs = pq.read_table(inputs["data"] / "evaluation_pairs.parquet").to_pylist()
    shown = [(one["prompt"], one["chosen"], one["rejected"]) for one in pairs]
    write_judge(folder, [TEMPLATE.format(question=q, first=a, second=b) for q, a, b in shown])
    running = TransformersServer(folder)
    yield running
    running.kill()


class Judging:
    """The program winrate with a home of its own, which is started as often as it takes."""

    def __init__(self, folder: Path, inputs: dict[str, Path], **judge: Any) -> None:
        job = {
            "seed": 0, "source": {"kind": "own", "path": "votes.jsonl"}, "text": TEXT,
            "winrate": {"num_questions": 8, "batch_size": 8}, "judge": JUDGE | judge,
        }  # fmt: skip
        self.run = tiny.write_job(folder / "run", "winrate", job, inputs)
        self.home = folder / "home"

    def start(self, url: str) -> Forked:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("ALIGNFLOW_HOME", str(self.home))
            environment.setenv("ALIGNFLOW_JUDGE_URL", url)
            environment.setenv("ALIGNFLOW_JUDGE_KEY", KEY)
            return tiny.start_program("winrate", self.run)

    def end(self, url: str) -> int:
        return self.start(url).wait(900)

    def num_kept(self) -> int:
        cache = VerdictCache(self.home / "verdicts.db")
        [(count,)] = cache._connection.execute("SELECT count(*) FROM replies")
        cache.close()
        return int(count)

    def verdicts(self) -> list[dict[str, Any]]:
        rows = pq.read_table(self.run / "artifact" / "verdicts.parquet").to_pylist()
        return [row for row in rows if row["judge"] == "lm"]


@pytest.fixture(scope="module")
def undisturbed(
    server: TransformersServer, inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Return the verdicts of a run without faults, whose prompts are each paid and delivered once."""
    judging = Judging(tmp_path_factory.mktemp("undisturbed"), inputs)
    with faults(server.url) as proxy:
        assert judging.end(proxy.url) == 0, (judging.run / "log.txt").read_text()
        assert set(proxy.paid.values()) == set(proxy.delivered.values()) == {1}
        assert len(proxy.paid) == judging.num_kept() > 40
        assert judging.end(proxy.url) == 0
        assert sum(proxy.asked.values()) == len(proxy.paid), "a second run asks nothing"
    found = judging.verdicts()
    assert {row["shown_first"] for row in found} == {"first", "second"}, "the judge reads the prompts"
    return found


def test_faults_lose_no_verdict_and_pay_none_twice_but_those_lost_on_the_wire(
    server: TransformersServer, inputs: dict[str, Path], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    plan: dict[str, list[Fault]] = {}
    kinds: list[list[Fault]] = [["busy"], ["slow"], ["cut"], ["busy", "cut", "busy"], ["cut", "slow"]]

    def choose(prompt: str, before: int) -> Fault:
        number = len(plan)
        failing = kinds[number // 4 % len(kinds)] if number % 4 == 0 and number < 40 else []
        planned = plan.setdefault(prompt, failing)
        return planned[before] if before < len(planned) else "none"

    judging = Judging(tmp_path, inputs, timeout=4.0)
    with faults(server.url, choose) as proxy:
        assert judging.end(proxy.url) == 0, (judging.run / "log.txt").read_text()
        proxy.released.set()
        wait_until(lambda: not proxy.holding)
        lost = {prompt: sum(fault != "busy" for fault in planned) for prompt, planned in plan.items()}
        assert sum(lost.values()) >= 8
        assert +proxy.lost == {prompt: count for prompt, count in lost.items() if count}
        assert set(proxy.delivered.values()) == {1}
        assert proxy.paid == {prompt: 1 + count for prompt, count in lost.items()}
        assert sum(proxy.refused.values()) == sum(planned.count("busy") for planned in plan.values()) >= 4
    assert judging.num_kept() == len(plan)
    assert judging.verdicts() == undisturbed


def hold_from(judging: Judging, proxy: FaultProxy, count: int) -> Forked:
    """Start judging; return when ``count`` replies are kept and all requests that follow are held."""
    proxy.choose = lambda prompt, before: "slow" if sum(proxy.delivered.values()) >= count else "none"
    process = judging.start(proxy.url)
    wait_until(lambda: proxy.holding == JUDGE["concurrency"] or process.poll() is not None)
    assert process.poll() is None, (judging.run / "log.txt").read_text()
    return process


def test_a_server_that_is_killed_ends_the_program_in_a_sentence_and_the_rest_is_asked_later(
    server: TransformersServer, inputs: dict[str, Path], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    judging = Judging(tmp_path, inputs, patience=2.0)
    with faults(server.url) as before:
        process = hold_from(judging, before, 20)
        kept = judging.num_kept()
        assert kept == sum(before.delivered.values()) >= 20
        server.kill()
        before.die()
        assert process.wait(900) == 2
    error = json.loads((judging.run / "error.json").read_text())
    assert error["input"]
    assert error["message"].startswith("The judge's endpoint did not answer a request for 2 s (ConnectError")
    num_graded = 2 * JUDGE["num_graded_pairs"]  # in both orders; their replies were all kept
    assert f"; {kept - num_graded} of " in error["message"]
    assert error["message"].endswith("replies are kept, so the same command goes on from them")
    assert not {KEY, "127.0.0.1"} & set(error["message"].split())

    server.start()
    with faults(server.url, port=before.port) as after:
        assert judging.end(after.url) == 0, (judging.run / "log.txt").read_text()
    check_rest(before, after)
    assert judging.verdicts() == undisturbed


def test_a_judge_that_is_killed_goes_on_with_the_rest(
    server: TransformersServer, inputs: dict[str, Path], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    judging = Judging(tmp_path, inputs)
    with faults(server.url) as before:
        process = hold_from(judging, before, 20)
        process.send_signal(signal.SIGKILL)
        process.wait(900)
        assert judging.num_kept() == sum(before.delivered.values())
        before.die()
        wait_until(lambda: not before.holding)
    with faults(server.url, port=before.port) as after:
        assert judging.end(after.url) == 0, (judging.run / "log.txt").read_text()
    check_rest(before, after)
    assert judging.verdicts() == undisturbed


def check_rest(before: FaultProxy, after: FaultProxy) -> None:
    """Check that the second run asked what the first had not got, and only what was lost was paid twice."""
    assert set(after.delivered.values()) == {1}
    assert not set(+before.delivered) & set(after.asked), "a reply that was kept was asked for again"
    assert sum(before.lost.values()) == JUDGE["concurrency"]
    assert {prompt for prompt, count in (before.paid + after.paid).items() if count > 1} == set(+before.lost)
