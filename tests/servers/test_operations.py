"""The real things: PostgreSQL, both servers, workers that share nothing but them, Prefect's pages in a browser; killed, cancelled and resumed.

The programs are fakes that take steps, checkpoint and derive their results from their inputs; everything above them is what a user runs.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import psutil
import pytest
from prefect.client.schemas.objects import StateType
from prefect.states import Scheduled

from flows.pipeline import chain
from flows.retrain import NO_CHANGE
from tasks.artifacts import code_version
from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.execution import program_environment
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages import report
from tests.support import fake_tree
from tests.support.pages import Pages
from tests.support.supervised_home import House, await_, command_of, postgres

# a profile of the user's own, whose stages run where its flow runs
QUICK = """
method: dpo
source: {kind: stack-exchange, path: Posts.xml}
pools: {gpu: ""}
"""


class Alerts:
    """A webhook's receiving end."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        heard = self.heard

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                heard.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/alert"


@pytest.fixture(scope="module")
def alerts() -> Iterator[Alerts]:
    made = Alerts()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, alerts: Alerts) -> Iterator[House]:
    root = tmp_path_factory.mktemp("house")
    tree = fake_tree.make_tree(root / "tree")
    (root / "quick.yaml").write_text(QUICK)
    (root / "Posts.xml").write_text("<posts/>")
    with postgres() as database, pytest.MonkeyPatch.context() as patched:
        made = House(root, tree, database, alerts.url, "quick.yaml")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patched.setenv(name, made.login[name])
        try:
            made.worker("cpu")
            made.worker("gpu")
            yield made
        finally:
            made.stop()


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(os.environ.get("ALIGNFLOW_PICTURES") or tmp_path) / request.node.name


@pytest.fixture(autouse=True)
def behaved(house: House) -> Iterator[None]:
    yield
    for stage in fake_tree.STAGES:
        fake_tree.misbehave(house.tree, stage, "")


def config(method: str = "ppo", smoothing: float = 0.1, **ppo: Any) -> dict[str, Any]:
    """Parameters of a run that trains on the pool gpu; other settings of PPO and DPO make other keys from there on."""
    pools, machine = {"gpu": "gpu"}, {"upload_seconds": 1, "checkpoint_steps": 1}
    dpo = {"label_smoothing": smoothing} if method != "ppo" else {}
    return {
        "config": {"method": method, "pools": pools, "machine": machine, "ppo": ppo, "dpo": dpo},
        "profile": "demo",
    }


def summary(house: House, run: UUID) -> dict[str, Any]:
    """What the flow run left on the worker that ran it."""
    return json.loads(house.file(run, "summary.json").read_text())


def digests(found: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["digest"] for stage in found["stages"]}


def built(found: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in found["stages"] if not stage["cached"]]


def expected(house: House, method: str = "ppo", **ppo: Any) -> dict[str, str]:
    """The digests that an uninterrupted run has that knows of no server."""
    found: dict[str, Artifact] = {}
    settings = Pipeline.model_validate(config(method, **ppo)["config"] | {"pools": {}})

    def do(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(settings, **inputs)
        found[step.stage] = run_stage(step, RunContext(settings.machine))
        return found[step.stage]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(program_environment, "ROOT", house.tree)
        patched.setattr(code_version, "ROOT", house.tree)
        patched.setenv("ALIGNFLOW_HOME", str(house.root / "in-place"))
        chain(settings, do)
        do(report, **found)
    return {name: artifact["digest"] for name, artifact in found.items()}


def completed(house: House, run: UUID, seconds: float = 300) -> dict[str, Any]:
    end = house.end(run, seconds)
    assert end.state.type == StateType.COMPLETED, end.state.message
    return summary(house, run)


def hanging(house: House, stage: str = "ppo") -> psutil.Process:
    """The program of a stage, once it hangs after a checkpoint."""
    process = await_(lambda: house.program(stage), 180)
    await_(lambda: Path(process.cwd(), "checkpoints", "step-00000002").exists(), 30)
    return process


def test_the_demo_is_triggered_from_the_page_with_a_changed_nested_parameter(
    house: House, pictures: Path
) -> None:
    with house.client() as client:
        deployment = client.read_deployment_by_name("rlhf/demo").id
    with Pages(house, pictures) as pages:
        run = pages.trigger(deployment, "KL coefficient", "0.07")
        found = completed(house, run, 180)
        pages.open_run(run)
        pages.picture("graph")
        assert pages.outside == []
    assert built(found) == [
        "site",
        "data",
        "pretrain",
        "sft",
        "merge",
        "reward",
        "ppo",
        "reference",
        "dpo",
        "winrate",
        "report",
    ]
    assert house.run(run).parameters["config"]["ppo"]["kl_coefficient"] == 0.07
    trained = {path.parent.name for path in (house.root / "gpu-1" / "objects").glob("*/*")}
    assert trained == {"pretrain", "sft", "merge", "reward", "ppo", "reference", "dpo", "winrate"}
    assert {path.parent.name for path in (house.root / "cpu-1" / "objects").glob("*/*")} == {
        "site",
        "data",
        "report",
    }
    (job,) = [
        json.loads(path.read_text())["job"]
        for path in (house.root / "gpu-1" / "objects" / "ppo").glob("*/manifest.json")
    ]
    assert job["ppo"]["kl_coefficient"] == 0.07


def test_a_stage_fails_and_retry_in_the_page_runs_only_it(
    house: House, alerts: Alerts, pictures: Path
) -> None:
    fake_tree.misbehave(house.tree, "ppo", "fail")
    run = house.trigger("rlhf/demo", **config(steps=2))
    assert house.end(run).state.type == StateType.FAILED
    message = await_(lambda: next((text for text in alerts.heard if str(run) in text), None))
    assert "The stage ppo failed: CUDA went away" in message
    fake_tree.misbehave(house.tree, "ppo", "")
    stages = len(house.stages())
    with Pages(house, pictures) as pages:
        pages.retry(run)
        await_(lambda: house.run(run).run_count == 2, 60)
        found = completed(house, run)
        pages.open_run(run)
        pages.picture("after-retry")
    assert built(found) == ["ppo", "winrate", "report"]
    assert [one.name for one in house.stages()[stages:]] == ["ppo", "winrate"]
    with house.client() as client:
        tasks = [one for one in client.read_task_runs(limit=200) if one.flow_run_id == run and one.run_count]
    names = {one.name.partition("-")[0]: one.state_name for one in sorted(tasks, key=lambda one: one.created)}
    assert {
        name: names[name] for name in ("site", "data", "pretrain", "sft", "merge", "reward")
    } == dict.fromkeys(("site", "data", "pretrain", "sft", "merge", "reward"), "Cached")
    assert digests(found) == expected(house, steps=2)


def test_whatever_is_killed_the_run_comes_to_the_same_end(house: House) -> None:
    """In one run: a program, another one's worker, and both servers with a third program while they are away.

    PPO and DPO are dispatched together, and the one worker takes them in either order.
    """
    for stage in ("ppo", "dpo", "winrate"):
        fake_tree.misbehave(house.tree, stage, "hang-at 3")
    before = len(house.stages())
    run = house.trigger("rlhf/demo", **config(method="both", steps=3))
    first = await_(lambda: next(filter(house.program, ("ppo", "dpo")), None), 180)
    second = "dpo" if first == "ppo" else "ppo"
    program = hanging(house, first)
    fake_tree.misbehave(house.tree, first, "")
    fake_tree.misbehave(house.tree, second, "slow")
    program.kill()
    await_(lambda: house.program(second), 60)
    name = house.worker("gpu")
    house.workers[name].kill()
    house.workers[name].wait()
    assert house.worker("gpu") != name
    program = hanging(house, "winrate")
    for port in (house.prefect_port, house.mlflow_port):
        for process in house.listening(port):
            process.kill()
    fake_tree.misbehave(house.tree, "winrate", "")
    program.kill()
    found = completed(house, run, 180)
    assert [fake_tree.beginnings(house.tree, stage)[-2:] for stage in (first, "winrate")] == [[0, 2], [0, 2]]
    assert digests(found) == expected(house, method="both", steps=3)
    assert house.up.poll() is None
    started = [one.name for one in house.stages()[before:]]
    assert [started.count(stage) for stage in ("ppo", "dpo", "winrate")] == [1, 1, 1]
    for stage in ("ppo", "dpo", "winrate"):
        assert house.steps_of(stage, "loss") == [1, 2, 3, 4, 5]
    assert any("goes on from its checkpoint" in line for line in house.lines(first))


def test_killed_flow_runs_are_started_again_and_join_what_goes_on_without_them(house: House) -> None:
    """First the one of a stage, with its program; then the pipeline's own, while its stage goes on."""
    fake_tree.misbehave(house.tree, "ppo", "hang-at 3")
    run = house.trigger("rlhf/demo", **config(steps=9))
    program = hanging(house)
    house.flow(house.stages()[-1].id).kill()
    await_(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE, 10)
    again = await_(lambda: (found := house.program("ppo")) and found.pid != program.pid and found, 60)
    house.flow(run).kill()
    assert await_(lambda: house.run(run).run_count == 2, 60)
    fake_tree.misbehave(house.tree, "ppo", "")
    again.kill()
    found = completed(house, run)
    assert digests(found) == expected(house, steps=9)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "ppo")
    assert [one.state.type for one in house.builders(key)] == [StateType.CRASHED, StateType.COMPLETED]
    assert house.steps_of("ppo", "loss") == [1, 2, 3, 4, 5]


def test_a_run_that_comes_back_at_once_does_not_end_its_worker(house: House) -> None:
    fake_tree.misbehave(house.tree, "ppo", "slow")
    run = house.trigger("rlhf/demo", **config(steps=10))
    await_(lambda: house.program("ppo"), 60)
    house.flow(run).kill()
    await_(lambda: house.run(run).state.type == StateType.CRASHED, every=0.02)
    with house.client() as client:
        client.set_flow_run_state(run, Scheduled())
    assert digests(completed(house, run)) == expected(house, steps=10)
    assert house.workers["cpu-1"].poll() is None
    (said,) = house.crashes(run)
    assert said is not None
    assert "SIGKILL" in said


class Lost(NamedTuple):
    trained: UUID  # a run whose stage was lost with its whole machine
    machine: str
    orchestrated: UUID  # a run that was itself lost with its machine, and not its stage


@pytest.fixture(scope="module")
def lost(house: House) -> Lost:
    """Other machines are there since."""
    fake_tree.misbehave(house.tree, "ppo", "hang-at 3")
    trained = house.trigger("rlhf/demo", **config(steps=5))
    hanging(house)
    await_(lambda: any("checkpoint.step" in tags for tags in house.tags_of_runs("ppo")), 30)
    fake_tree.misbehave(house.tree, "ppo", "")
    machine = house.worker("gpu")
    house.lose(machine)
    house.worker("gpu")

    name = house.worker("cpu")
    house.workers[name].kill()  # the first run's pipeline outlives its worker
    house.workers[name].wait()
    fake_tree.misbehave(house.tree, "dpo", "hang-at 3")
    orchestrated = house.trigger("rlhf/demo", **config("dpo", smoothing=0.2))
    other = house.worker("cpu")
    program = hanging(house, "dpo")
    house.lose(other)
    house.worker("cpu")
    fake_tree.misbehave(house.tree, "dpo", "")
    program.kill()
    return Lost(trained, machine, orchestrated)


def test_a_lost_machine_is_not_noticed_at_once(house: House, lost: Lost) -> None:
    """What comes of it is looked at in the last tests: the server waits for three heartbeats of half a minute."""
    for run in (lost.trained, lost.orchestrated):
        assert house.run(run).state.type == StateType.RUNNING


def test_cancel_in_the_page_ends_the_program_and_the_next_run_resumes(house: House, pictures: Path) -> None:
    fake_tree.misbehave(house.tree, "ppo", "hang-at 3")
    run = house.trigger("rlhf/demo", **config(steps=7))
    program = hanging(house)
    with Pages(house, pictures) as pages:
        pages.cancel(run)
        cancelled = time.monotonic()
        await_(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE, 20)
        print(f"cancelled: the program was gone after {time.monotonic() - cancelled:.1f} s")
        assert house.end(run, 60).state.type == StateType.CANCELLED
        pages.open_run(run)
        pages.picture("cancelled")
    await_(lambda: house.statuses("ppo")[0] == "KILLED" and house.statuses("demo")[0] == "KILLED", 30)
    fake_tree.misbehave(house.tree, "ppo", "")
    again = house.trigger("rlhf/demo", **config(steps=7))
    assert digests(completed(house, again)) == expected(house, steps=7)
    assert any("goes on from its checkpoint" in line for line in house.lines("ppo"))


def test_two_runs_at_once_compute_each_stage_once(house: House) -> None:
    fake_tree.misbehave(house.tree, "ppo", "slow")
    runs = [house.trigger("rlhf/demo", **config(steps=8)) for _ in range(2)]
    first, second = (completed(house, run) for run in runs)
    assert digests(first) == digests(second)
    for stage in first["stages"]:
        if stage["name"] in ("ppo", "winrate"):
            assert len(house.builders(stage["key"])) == 1


def test_retraining_skips_when_nothing_changed_fires_on_schedule_and_takes_new_data(house: House) -> None:
    with house.client() as client:
        found = client.read_deployment_by_name("retrain/quick")
        assert [(one.active, one.schedule.cron) for one in found.schedules] == [(False, "0 3 * * 0")]
        assert found.global_concurrency_limit.limit == 1
    assert house.end(house.trigger("retrain/quick")).state.name == "Completed"
    house.schedule("retrain/quick", seconds=20)
    again = house.end(house.trigger("retrain/quick"))
    assert (again.state.name, again.state.message) == ("Cached", NO_CHANGE)
    assert again.total_run_time.total_seconds() <= 10
    fired = await_(
        lambda: next(
            (run for run in house.runs_of(found.id) if run.auto_scheduled and run.state.is_final()), None
        ),
        100,
        every=1,
    )
    assert fired.state.name == "Cached"
    house.unschedule("retrain/quick")

    dump = house.root / "new" / "Posts.xml"
    dump.parent.mkdir()
    dump.write_text("<posts/>\n")  # other bytes, the same posts: only what reads them is built
    house.land("quick", dump)
    landed = await_(
        lambda: next(
            (run for run in house.runs_of(found.id) if run.parameters.get("dump") == str(dump)), None
        ),
        30,
    )
    assert house.end(landed.id).state.name == "Completed"
    summaries = [json.loads(path.read_text()) for path in house.root.glob("cpu-*/runs/*/summary.json")]
    newest = max(
        (found for found in summaries if found["profile"] == "quick"), key=lambda found: found["finished"]
    )
    assert built(newest) == ["data"]


OPEN = {"/health", "/ready"}  # say that the server is there, and nothing else


def landed(house: House, *arguments: str) -> tuple[int, str]:
    """Run `alignflow landed` as another machine would; its status and what it says."""
    log = house.root / "landed.txt"
    log.unlink(missing_ok=True)
    process = house.start(log, house.root / "laptop", "landed", *arguments, **house.login)
    return process.wait(90), log.read_text()


def test_landed_says_which_run_takes_the_data_and_refuses_what_could_start_none(house: House) -> None:
    dump = house.root / "new" / "Posts.xml"
    dump.parent.mkdir(exist_ok=True)
    dump.write_text("<posts><!-- for landed --></posts>")
    status, text = landed(house, "quik", str(dump))
    assert (status, text) == (
        2,
        "alignflow: The Prefect server has no deployment retrain/quik; did you mean quick?\n",
    )
    (house.root / "empty").mkdir(exist_ok=True)
    status, text = landed(house, "quick", str(house.root / "empty"))
    assert status == 2
    assert "holds no file whose name ends in" in text
    status, text = landed(house, "quick", str(dump))
    assert status == 0, text
    assert text.startswith(f"retrain/quick takes {dump}: its run ")
    assert f"{house.prefect}/runs/flow-run/" in text


def test_without_credentials_every_call_to_prefect_is_refused(house: House) -> None:
    calls = httpx.get(f"{house.prefect}/openapi.json").json()["paths"]
    assert len(calls) > 140
    answers = {}
    with httpx.Client(base_url=house.prefect) as client:
        for path, methods in calls.items():
            for method in methods:
                answers[method, path] = client.request(
                    method, "/api" + path.replace("{", "").replace("}", ""), json={}
                ).status_code
    refused = {status for (_, path), status in answers.items() if path not in OPEN}
    assert refused <= {401, 403}, [call for call, status in answers.items() if status not in (401, 403)]
    assert answers["get", "/flow_runs/{id}"] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/2.0/mlflow/experiments/search",
        "/ajax-api/2.0/mlflow/runs/search",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/graphql",
        "/version",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_without_credentials_every_call_to_mlflow_is_refused(house: House, path: str, method: str) -> None:
    assert httpx.request(method, house.mlflow + path, json={}).status_code in (401, 405)
    assert httpx.get(house.mlflow + path).status_code == 401


def test_a_page_of_another_origin_gets_nothing(house: House) -> None:
    foreign = {"Origin": "http://evil.example"}
    login = ("alignflow", house.password)
    asked = httpx.post(f"{house.prefect}/api/flow_runs/filter", json={}, headers=foreign, auth=login)
    assert "access-control-allow-origin" not in asked.headers
    assert asked.status_code == 403  # no CSRF token
    may_it = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert httpx.options(f"{house.prefect}/api/flow_runs/filter", headers=foreign | may_it).status_code in (
        400,
        401,
        403,
    )
    tracked = httpx.post(
        f"{house.mlflow}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers=foreign,
        auth=login,
    )
    assert tracked.status_code == 403
    assert "access-control-allow-origin" not in tracked.headers
    asked = httpx.post(
        f"{house.mlflow}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers={"Host": "evil.example"},
        auth=login,
    )
    assert asked.status_code == 403


def text_of(path: Path) -> str:
    """What a file holds; nothing of one that has gone meanwhile: a lost run is at work again."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return ""


def test_no_password_is_in_a_log_a_command_line_or_a_parameter(house: House) -> None:
    secret = house.password
    logs = [
        path
        for path in house.root.rglob("*")
        if path.is_file() and path.suffix in (".log", ".txt", ".json", ".jsonl", ".html", ".yaml")
    ]
    assert secret in text_of(house.home / "credentials.json")
    assert [
        path for path in logs if secret in text_of(path) and path != house.home / "credentials.json"
    ] == []
    assert [line for process in house.processes() if secret in " ".join(line := command_of(process))] == []
    with house.client() as client:
        assert [
            run.name for run in client.read_flow_runs(limit=200) if secret in json.dumps(run.parameters)
        ] == []
    for path in (house.home / "credentials.json", house.home / "mlflow-auth.ini"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_second_up_says_what_is_running(house: House) -> None:
    status, out, _ = fake_tree.alignflow(house.tree, house.home, "up")
    assert status == 0
    assert house.prefect in out
    assert house.mlflow in out


def test_a_lost_machine_is_noticed_and_another_goes_on_from_its_checkpoint(house: House, lost: Lost) -> None:
    found = completed(house, lost.trained, 480)
    assert digests(found) == expected(house, steps=5)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "ppo")
    first, second = house.builders(key)
    assert (first.state.type, second.state.type) == (StateType.CRASHED, StateType.COMPLETED)
    print(
        f"a lost machine: noticed {(first.end_time - first.start_time).total_seconds():.0f} s after the stage had begun"
    )
    assert any("goes on from its checkpoint" in line for line in house.lines("ppo"))
    assert not (house.root / lost.machine / "objects" / "ppo" / key).exists()


def test_a_lost_orchestrator_is_replaced_and_its_stages_are_not_repeated(house: House, lost: Lost) -> None:
    await_(
        lambda: house.run(lost.orchestrated).run_count == 2, 180, every=0.5
    )  # after it was Crashed for a while
    found = completed(house, lost.orchestrated)
    assert digests(found) == expected(house, method="dpo", smoothing=0.2)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "dpo")
    assert [one.state.type for one in house.builders(key)] == [StateType.COMPLETED]
