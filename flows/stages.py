"""The unit that a worker pulls: one stage as a flow, deployed once per work pool."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

import tasks.programs.config as config
from flows.figures import figure
from flows.heartbeat import heartbeat
from tasks import events
from tasks.artifact import Artifact, Step, code_of
from tasks.dispatch import BAD_INPUT, INPUT_MISSING, OTHER_CODE
from tasks.events import Event
from tasks.far import InputMissing
from tasks.launch import StageFailed, warm_up
from tasks.programs.config import InputError, Machine
from tasks.stage import Seat, run_stage

LOG_SECONDS = 10.0  # between two lines of progress in the run's log


@flow(name="stage", flow_run_name="{stage}", persist_result=False)
def stage(
    stage: str,
    job: dict[str, Any],
    inputs: dict[str, Any],
    shown: list[str],
    sources: dict[str, str],
    machine: Machine = Machine(),  # noqa: B008
    tracked: str | None = None,
) -> State:
    """Run one stage on this worker; started by the flow rlhf, not by hand.

    Args:
        stage: Name of the stage.
        job: The stage's settings.
        inputs: The artifacts that it takes.
        shown: Metrics for the log.
        sources: Digests of the code that the asking side has; a worker with other code refuses.
        machine: How the program uses this machine.
        tracked: The parent run in MLflow.
    """
    if different := _different(sources, code_of(stage)):
        text = f"This worker has other code than whoever asked for the stage {stage} ({', '.join(different[:4])}): install the same version on both"
        return Failed(message=OTHER_CODE + text)
    step = as_step(stage, job, inputs, shown)
    warm_up(stage, machine)
    try:
        with heartbeat(), _logged():
            artifact = run_stage(step, Seat(machine, tracked, shared=True))
    except InputError as error:
        return Failed(message=f"{BAD_INPUT}{error}")
    except InputMissing as error:
        return Failed(message=f"{INPUT_MISSING}{error}")
    except StageFailed as error:
        return Failed(message=str(error))
    return Completed(name="Cached" if artifact["cached"] else "Completed", message=f"{stage} {artifact['key'][:12]}")


def as_step(stage: str, job: dict[str, Any], inputs: dict[str, Artifact], shown: list[str]) -> Step:
    """The step that ``dispatch.parameters`` wrote down."""
    job_type: type[config.Job] = getattr(config, f"{stage.capitalize()}Job")
    return Step(stage, job_type.model_validate(job), inputs, tuple(shown))


def _different(theirs: dict[str, str], ours: dict[str, str]) -> list[str]:
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


@contextmanager
def _logged() -> Iterator[None]:
    """The stage's events as lines of the run's log in Prefect's pages."""
    logger = get_run_logger()
    last = 0.0
    shown: tuple[str, ...] = ()

    def on_event(event: Event) -> None:
        nonlocal last, shown
        about = event.about
        match event.kind:
            case "start":
                shown = about["shown"]
            case "resume":
                logger.info("%s goes on from its checkpoint", event.stage)
            case "step" if time.monotonic() - last > LOG_SECONDS:
                last, line = time.monotonic(), about["line"]
                figures = "".join(f"  {name} {figure(line[name])}" for name in shown if name in line)
                phase = f"{line['phase']} " if line.get("phase") else ""
                logger.info("%s %s%s/%s%s", event.stage, phase, line.get("step"), line.get("total"), figures)
            case "warning":
                logger.warning("%s", about["text"])
            case "built" | "reused":
                logger.info("%s %s", event.stage, event.kind)

    unlisten = events.listen(on_event)
    try:
        yield
    finally:
        unlisten()
