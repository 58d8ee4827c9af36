"""Test a whole installation with Prefect's pages in a browser: processes are killed, cancelled and resumed.

PostgreSQL, both servers and the workers are real. The programs are fakes that take steps, write
checkpoints and derive their results from their inputs.
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
from tasks.stages.report import report
from tests.support import fake_programs
from tests.support.fake_programs import wait_until
from tests.support.installation import REQUEST_SECONDS, Installation, command_line
from tests.support.pages.prefect_pages import PrefectPages, cancel_run, open_run, retry_run, trigger_run
from tests.support.postgres import postgres

pytestmark = pytest.mark.slow
LONG = 900.0  # seconds; the machine may be busy

# a profile of the user's own, whose stages run where its flow runs
QUICK = """
method: dpo
source: {kind: stack-exchange, path: Posts.xml}
pools: {gpu: ""}
"""


class Alerts:
    """The receiving end of a webhook."""

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
def installation(tmp_path_factory: pytest.TempPathFactory, alerts: Alerts) -> Iterator[Installation]:
    root = tmp_path_factory.mktemp("installation")
    tree = fake_programs.make_tree(root / "tree")
    (root / "quick.yaml").write_text(QUICK)
    (root / "Posts.xml").write_text("<posts/>")
    with postgres() as database, pytest.MonkeyPatch.context() as patched:
        made = Installation(root, tree, database, alerts.url, "quick.yaml")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patched.setenv(name, made.login[name])
        try:
            made.running_worker("cpu")
            made.running_worker("gpu")
            yield made
        finally:
            made.stop()


@pytest.fixture
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(os.environ.get("ALIGNFLOW_PICTURES") or tmp_path) / request.node.name


@pytest.fixture(autouse=True)
def behaved(installation: Installation) -> Iterator[None]:
    yield
    for stage in fake_programs.STAGES:
        fake_programs.misbehave(installation.tree, stage, "")


def config(method: str = "ppo", smoothing: float = 0.1, **ppo: Any) -> dict[str, Any]:
    """Return the parameters of a run that trains on the pool gpu; other settings of PPO and DPO lead to
    other keys.
    """
    pools, machine = {"gpu": "gpu"}, {"upload_seconds": 1, "checkpoint_steps": 1}
    dpo = {"label_smoothing": smoothing} if method != "ppo" else {}
    return {
        "config": {"method": method, "pools": pools, "machine": machine, "ppo": ppo, "dpo": dpo},
        "profile": "demo",
    }


def summary(installation: Installation, run: UUID) -> dict[str, Any]:
    """Return the summary that the flow run left on the worker that ran it."""
    return json.loads(installation.run_file(run, "summary.json").read_text())


def digests(found: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["digest"] for stage in found["stages"]}


def built(found: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in found["stages"] if not stage["cached"]]


def expected(installation: Installation, method: str = "ppo", **ppo: Any) -> dict[str, str]:
    """Return the digests of an uninterrupted run without servers."""
    found: dict[str, Artifact] = {}
    settings = Pipeline.model_validate(config(method, **ppo)["config"] | {"pools": {}})

    def build(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(settings, **inputs)
        found[step.stage] = run_stage(step, RunContext(settings.machine))
        return found[step.stage]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(program_environment, "ROOT", installation.tree)
        patched.setattr(code_version, "ROOT", installation.tree)
        patched.setenv("ALIGNFLOW_HOME", str(installation.root / "in-place"))
        chain(settings, build)
        build(report, **found)
    return {name: artifact["digest"] for name, artifact in found.items()}


def completed(installation: Installation, run: UUID) -> dict[str, Any]:
    end = installation.wait_for_run(run)
    assert end.state.type == StateType.COMPLETED, end.state.message
    return summary(installation, run)


def hanging(installation: Installation, stage: str = "ppo", steps: int | None = None) -> psutil.Process:
    """Wait until the program of a stage (with that many steps of PPO) hangs after a checkpoint; return its
    process.
    """
    process = wait_until(lambda: installation.program(stage, steps), every=0.2)
    wait_until(lambda: Path(process.cwd(), "checkpoints", "step-00000002").exists())
    return process


def test_the_demo_is_triggered_from_the_page_with_a_changed_nested_parameter(
    installation: Installation, pictures: Path
) -> None:
    with installation.client() as client:
        deployment = client.read_deployment_by_name("rlhf/demo").id
    with PrefectPages(installation, pictures) as pages:
        run = trigger_run(pages, installation, deployment, "KL coefficient", "0.07")
        found = completed(installation, run)
        open_run(pages, run)
        pages.screenshot("graph")
        assert pages.outside == []
    assert built(found) == [*fake_programs.STAGES]
    assert installation.read_run(run).parameters["config"]["ppo"]["kl_coefficient"] == 0.07
    trained = {path.parent.name for path in (installation.root / "gpu-1" / "objects").glob("*/*")}
    assert trained == {*fake_programs.STAGES} - {"site", "data", "report"}
    assert {path.parent.name for path in (installation.root / "cpu-1" / "objects").glob("*/*")} == {
        "site",
        "data",
        "report",
    }
    (job,) = [
        json.loads(path.read_text())["job"]
        for path in (installation.root / "gpu-1" / "objects" / "ppo").glob("*/manifest.json")
    ]
    assert job["ppo"]["kl_coefficient"] == 0.07


def test_a_stage_fails_and_retry_in_the_page_runs_only_it(
    installation: Installation, alerts: Alerts, pictures: Path
) -> None:
    fake_programs.misbehave(installation.tree, "ppo", "fail")
    run = installation.trigger("rlhf/demo", **config(steps=2))
    assert installation.wait_for_run(run).state.type == StateType.FAILED
    message = wait_until(lambda: next((text for text in alerts.heard if str(run) in text), None))
    assert "The stage ppo failed: CUDA went away" in message
    fake_programs.misbehave(installation.tree, "ppo", "")
    stages = len(installation.stage_runs())
    with PrefectPages(installation, pictures) as pages:
        retry_run(pages, run)
        wait_until(lambda: installation.read_run(run).run_count == 2, every=REQUEST_SECONDS)
        pages.leave()
        found = completed(installation, run)
        open_run(pages, run)
        pages.screenshot("after-retry")
    assert built(found) == ["ppo", "answers", "winrate", "benchmarks", "report"]
    dispatched = [one.name for one in installation.stage_runs()[stages:]]
    assert dispatched[0] == "ppo"  # benchmarks waits for no answers
    assert sorted(dispatched[1:]) == ["answers", "benchmarks", "winrate"]
    with installation.client() as client:
        tasks = [one for one in client.read_task_runs(limit=200) if one.flow_run_id == run and one.run_count]
    names = {one.name.partition("-")[0]: one.state_name for one in sorted(tasks, key=lambda one: one.created)}
    assert {
        name: names[name] for name in ("site", "data", "pretrain", "sft", "merge", "reward")
    } == dict.fromkeys(("site", "data", "pretrain", "sft", "merge", "reward"), "Cached")
    assert digests(found) == expected(installation, steps=2)


def test_whatever_is_killed_the_run_comes_to_the_same_end(installation: Installation) -> None:
    """In one run: a program, another one's worker, and both servers with a third program while they are away.

    PPO and DPO are dispatched together, and the one worker takes them in either order.
    """
    for stage in ("ppo", "dpo", "winrate"):
        fake_programs.misbehave(installation.tree, stage, "hang-at 3")
    before = len(installation.stage_runs())
    run = installation.trigger("rlhf/demo", **config(method="both", steps=3))
    first = wait_until(lambda: next(filter(installation.program, ("ppo", "dpo")), None), every=0.2)
    second = "dpo" if first == "ppo" else "ppo"
    program = hanging(installation, first)
    fake_programs.misbehave(installation.tree, first, "")
    fake_programs.misbehave(installation.tree, second, "slow")
    program.kill()
    wait_until(lambda: installation.program(second), every=0.2)
    name = installation.running_worker("gpu")
    installation.workers[name].kill()
    installation.workers[name].wait()
    assert installation.running_worker("gpu") != name
    program = hanging(installation, "winrate")
    for port in (installation.prefect_port, installation.mlflow_port):
        for process in installation.server_processes(port):
            process.kill()
    fake_programs.misbehave(installation.tree, "winrate", "")
    program.kill()
    found = completed(installation, run)
    assert [fake_programs.start_steps(installation.tree, stage)[-2:] for stage in (first, "winrate")] == [
        [0, 2],
        [0, 2],
    ]
    assert digests(found) == expected(installation, method="both", steps=3)
    assert installation.up.poll() is None
    started = [one.name for one in installation.stage_runs()[before:]]
    assert [started.count(stage) for stage in ("ppo", "dpo", "winrate")] == [1, 1, 1]
    for stage in ("ppo", "dpo", "winrate"):
        assert installation.tracked_steps(stage, "loss") == [1, 2, 3, 4, 5]
    assert any("goes on from its checkpoint" in line for line in installation.log_lines(first))


def test_killed_flow_runs_are_started_again_and_join_what_goes_on_without_them(
    installation: Installation,
) -> None:
    """First a stage's flow run with its program, then the pipeline's own while its stage continues."""
    fake_programs.misbehave(installation.tree, "ppo", "hang-at 3")
    run = installation.trigger("rlhf/demo", **config(steps=9))
    program = hanging(installation)
    installation.flow_process(installation.stage_runs()[-1].id).kill()
    wait_until(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE)
    again = wait_until(lambda: (found := installation.program("ppo")) and found.pid != program.pid and found)
    installation.flow_process(run).kill()
    wait_until(lambda: installation.read_run(run).run_count == 2, every=REQUEST_SECONDS)
    fake_programs.misbehave(installation.tree, "ppo", "")
    again.kill()
    found = completed(installation, run)
    assert digests(found) == expected(installation, steps=9)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "ppo")
    assert [one.state.type for one in installation.stage_runs_of(key)] == [
        StateType.CRASHED,
        StateType.COMPLETED,
    ]
    assert installation.tracked_steps("ppo", "loss") == [1, 2, 3, 4, 5]


def test_a_run_that_comes_back_at_once_does_not_end_its_worker(installation: Installation) -> None:
    fake_programs.misbehave(installation.tree, "ppo", "slow")
    run = installation.trigger("rlhf/demo", **config(steps=10))
    wait_until(lambda: installation.program("ppo"), every=0.2)
    installation.flow_process(run).kill()
    wait_until(lambda: installation.read_run(run).state.type == StateType.CRASHED, every=0.02)
    with installation.client() as client:
        client.set_flow_run_state(run, Scheduled())
    assert digests(completed(installation, run)) == expected(installation, steps=10)
    assert installation.workers["cpu-1"].poll() is None
    (said,) = installation.crash_messages(run)
    assert said is not None
    assert "SIGKILL" in said


class Lost(NamedTuple):
    trained: UUID  # a run whose stage was lost with its whole machine
    machine: str
    orchestrated: UUID  # a run that was itself lost with its machine, and not its stage


@pytest.fixture(scope="module")
def lost(installation: Installation) -> Lost:
    """Lose a machine during a stage and another during its pipeline; start new workers for both."""
    fake_programs.misbehave(installation.tree, "ppo", "hang-at 3")
    trained = installation.trigger("rlhf/demo", **config(steps=5))
    hanging(installation)
    wait_until(
        lambda: "checkpoint.step" in installation.tracked_tags("ppo")[0], every=REQUEST_SECONDS
    )  # uploaded
    fake_programs.misbehave(installation.tree, "ppo", "")
    machine = installation.running_worker("gpu")
    installation.kill_machine(machine)
    installation.running_worker("gpu")

    name = installation.running_worker("cpu")
    installation.workers[name].kill()  # the first run's pipeline outlives its worker
    installation.workers[name].wait()
    fake_programs.misbehave(installation.tree, "dpo", "hang-at 3")
    orchestrated = installation.trigger("rlhf/demo", **config("dpo", smoothing=0.2))
    other = installation.running_worker("cpu")
    program = hanging(installation, "dpo")
    installation.kill_machine(other)
    installation.running_worker("cpu")
    fake_programs.misbehave(installation.tree, "dpo", "")
    program.kill()
    return Lost(trained, machine, orchestrated)


def test_a_lost_machine_is_not_noticed_at_once(installation: Installation, lost: Lost) -> None:
    """The last tests check what happens then: the server waits for three heartbeats of half a minute."""
    for run in (lost.trained, lost.orchestrated):
        assert installation.read_run(run).state.type == StateType.RUNNING


def test_cancel_in_the_page_ends_the_program_and_the_next_run_resumes(
    installation: Installation, pictures: Path
) -> None:
    fake_programs.misbehave(installation.tree, "ppo", "hang-at 3 of 7")
    run = installation.trigger("rlhf/demo", **config(steps=7))
    program = hanging(installation, steps=7)
    with PrefectPages(installation, pictures) as pages:
        cancel_run(pages, run)
        cancelled = time.monotonic()
        wait_until(lambda: not program.is_running() or program.status() == psutil.STATUS_ZOMBIE)
        print(f"cancelled: the program was gone after {time.monotonic() - cancelled:.1f} s")
        pages.leave()
        assert installation.wait_for_run(run).state.type == StateType.CANCELLED
        open_run(pages, run)
        pages.screenshot("cancelled")
    wait_until(
        lambda: (
            installation.tracked_statuses("ppo")[0] == "KILLED"
            and installation.tracked_statuses("demo")[0] == "KILLED"
        ),
        every=REQUEST_SECONDS,
    )
    fake_programs.misbehave(installation.tree, "ppo", "")
    again = installation.trigger("rlhf/demo", **config(steps=7))
    assert digests(completed(installation, again)) == expected(installation, steps=7)
    assert any("goes on from its checkpoint" in line for line in installation.log_lines("ppo"))


def test_two_runs_at_once_compute_each_stage_once(installation: Installation) -> None:
    fake_programs.misbehave(installation.tree, "ppo", "slow")
    runs = [installation.trigger("rlhf/demo", **config(steps=8)) for _ in range(2)]
    first, second = (completed(installation, run) for run in runs)
    assert digests(first) == digests(second)
    for stage in first["stages"]:
        if stage["name"] in ("ppo", "answers", "winrate"):
            assert len(installation.stage_runs_of(stage["key"])) == 1


def test_retraining_skips_when_nothing_changed_fires_on_schedule_and_takes_new_data(
    installation: Installation,
) -> None:
    with installation.client() as client:
        found = client.read_deployment_by_name("retrain/quick")
        assert [(one.active, one.schedule.cron) for one in found.schedules] == [(False, "0 3 * * 0")]
        assert found.global_concurrency_limit.limit == 1
    assert installation.wait_for_run(installation.trigger("retrain/quick")).state.name == "Completed"
    installation.add_schedule("retrain/quick", seconds=20)
    again = installation.wait_for_run(installation.trigger("retrain/quick"))
    assert (again.state.name, again.state.message) == ("Cached", NO_CHANGE)
    fired = wait_until(
        lambda: next(
            (run for run in installation.runs_of(found.id) if run.auto_scheduled and run.state.is_final()),
            None,
        ),
        every=1,
    )
    assert fired.state.name == "Cached"
    installation.remove_schedules("retrain/quick")

    dump = installation.root / "new" / "Posts.xml"
    dump.parent.mkdir()
    dump.write_text("<posts/>\n")  # other bytes, the same posts: only what reads them is built
    installation.announce_dump("quick", dump)
    landed = wait_until(
        lambda: next(
            (run for run in installation.runs_of(found.id) if run.parameters.get("dump") == str(dump)), None
        ),
        every=REQUEST_SECONDS,
    )
    assert installation.wait_for_run(landed.id).state.name == "Completed"
    summaries = [json.loads(path.read_text()) for path in installation.root.glob("cpu-*/runs/*/summary.json")]
    newest = max(
        (found for found in summaries if found["profile"] == "quick"), key=lambda found: found["finished"]
    )
    assert built(newest) == ["data"]


OPEN = {"/health", "/ready"}  # say that the server is there, and nothing else


def landed(installation: Installation, *arguments: str) -> tuple[int, str]:
    """Run `alignflow landed` as on another machine; return its status and output."""
    log = installation.root / "landed.txt"
    log.unlink(missing_ok=True)
    process = installation.start_cli(
        log, installation.root / "laptop", "landed", *arguments, **installation.login
    )
    return process.wait(900), log.read_text()


def test_landed_says_which_run_takes_the_data_and_refuses_what_could_start_none(
    installation: Installation,
) -> None:
    dump = installation.root / "new" / "Posts.xml"
    dump.parent.mkdir(exist_ok=True)
    dump.write_text("<posts><!-- for landed --></posts>")
    status, text = landed(installation, "quik", str(dump))
    assert (status, text) == (
        2,
        "alignflow: The Prefect server has no deployment retrain/quik; did you mean quick?\n",
    )
    (installation.root / "empty").mkdir(exist_ok=True)
    status, text = landed(installation, "quick", str(installation.root / "empty"))
    assert status == 2
    assert "holds no file whose name ends in" in text
    status, text = landed(installation, "quick", str(dump))
    assert status == 0, text
    assert text.startswith(f"retrain/quick takes {dump}: its run ")
    assert f"{installation.prefect}/runs/flow-run/" in text


def test_without_credentials_every_call_to_prefect_is_refused(installation: Installation) -> None:
    calls = httpx.get(f"{installation.prefect}/openapi.json", timeout=LONG).json()["paths"]
    assert len(calls) > 140
    answers = {}
    with httpx.Client(base_url=installation.prefect, timeout=LONG) as client:
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
def test_without_credentials_every_call_to_mlflow_is_refused(
    installation: Installation, path: str, method: str
) -> None:
    assert httpx.request(method, installation.mlflow + path, json={}, timeout=LONG).status_code in (401, 405)
    assert httpx.get(installation.mlflow + path, timeout=LONG).status_code == 401


def test_a_page_of_another_origin_gets_nothing(installation: Installation) -> None:
    foreign = {"Origin": "http://evil.example"}
    login = ("alignflow", installation.password)
    asked = httpx.post(
        f"{installation.prefect}/api/flow_runs/filter", json={}, headers=foreign, auth=login, timeout=LONG
    )
    assert "access-control-allow-origin" not in asked.headers
    assert asked.status_code == 403  # no CSRF token
    may_it = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert httpx.options(
        f"{installation.prefect}/api/flow_runs/filter", headers=foreign | may_it
    ).status_code in (
        400,
        401,
        403,
    )
    tracked = httpx.post(
        f"{installation.mlflow}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers=foreign,
        auth=login,
        timeout=LONG,
    )
    assert tracked.status_code == 403
    assert "access-control-allow-origin" not in tracked.headers
    asked = httpx.post(
        f"{installation.mlflow}/api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers={"Host": "evil.example"},
        auth=login,
        timeout=LONG,
    )
    assert asked.status_code == 403


def text_of(path: Path) -> str:
    """Return a file's text; empty if it has been deleted meanwhile, since a lost run is working again."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(errors="replace")
    return ""


def test_no_password_is_in_a_log_a_command_line_or_a_parameter(installation: Installation) -> None:
    secret = installation.password
    logs = [
        path
        for path in installation.root.rglob("*")
        if path.is_file() and path.suffix in (".log", ".txt", ".json", ".jsonl", ".html", ".yaml")
    ]
    assert secret in text_of(installation.home / "credentials.json")
    assert [
        path for path in logs if secret in text_of(path) and path != installation.home / "credentials.json"
    ] == []
    assert [
        line for process in installation.processes() if secret in " ".join(line := command_line(process))
    ] == []
    with installation.client() as client:
        assert [
            run.name for run in client.read_flow_runs(limit=200) if secret in json.dumps(run.parameters)
        ] == []
    for path in (installation.home / "credentials.json", installation.home / "mlflow-auth.ini"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_second_up_says_what_is_running(installation: Installation) -> None:
    status, out, _ = fake_programs.run_cli(installation.tree, installation.home, "up")
    assert status == 0
    assert installation.prefect in out
    assert installation.mlflow in out


def test_a_lost_machine_is_noticed_and_another_goes_on_from_its_checkpoint(
    installation: Installation, lost: Lost
) -> None:
    found = completed(installation, lost.trained)
    assert digests(found) == expected(installation, steps=5)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "ppo")
    first, second = installation.stage_runs_of(key)
    assert (first.state.type, second.state.type) == (StateType.CRASHED, StateType.COMPLETED)
    print(
        f"a lost machine: noticed {(first.end_time - first.start_time).total_seconds():.0f} s after "
        "the stage had begun"
    )
    assert any("goes on from its checkpoint" in line for line in installation.messages(second.id))
    assert not (installation.root / lost.machine / "objects" / "ppo" / key).exists()


def test_a_lost_orchestrator_is_replaced_and_its_stages_are_not_repeated(
    installation: Installation, lost: Lost
) -> None:
    wait_until(
        lambda: installation.read_run(lost.orchestrated).run_count == 2, every=0.5
    )  # after it was Crashed for a while
    found = completed(installation, lost.orchestrated)
    assert digests(found) == expected(installation, method="dpo", smoothing=0.2)
    key = next(stage["key"] for stage in found["stages"] if stage["name"] == "dpo")
    assert [one.state.type for one in installation.stage_runs_of(key)] == [StateType.COMPLETED]
