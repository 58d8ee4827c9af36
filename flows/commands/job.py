"""`alignflow job`: write the job.json of one stage, to run its program by hand."""

from pathlib import Path
from typing import Any

from flows.commands.plan import unbuilt_artifact
from flows.pipeline import chain
from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import look_up, write_job
from tasks.stages import report
from tasks.system.errors import InputError
from tasks.tracking.client import process_tracker


class _Found(Exception):
    """The walk has come to the stage asked for."""


def prepare_job(config: Pipeline, wanted: str, directory: Path) -> None:
    """Write the job.json of one stage into ``directory``; the stages before it must be in the store. Raises InputError."""
    made: dict[str, Artifact] = {}

    def do(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        if step.stage == wanted:
            directory.mkdir(parents=True, exist_ok=True)
            write_job(directory, step, config.machine, process_tracker())
            raise _Found
        found = look_up(step, process_tracker())
        # what lies beside the path to the wanted stage may be missing
        made[step.stage] = found or unbuilt_artifact(step)
        return made[step.stage]

    try:
        chain(config, _complaining(do, wanted))
        _complaining(do, wanted)(report, **made)
    except _Found:
        return
    raise InputError(f"This profile has no stage {wanted}; it has: {', '.join(made)}, report")


def _complaining(do: Any, wanted: str) -> Any:
    def checked(stage: Any, **inputs: Artifact) -> Artifact:
        missing = [artifact["stage"] for artifact in inputs.values() if not artifact["digest"]]
        if missing and stage.run.name == wanted:
            raise InputError(
                f"The stage {wanted} takes the result of {', '.join(missing)}, not built yet; `alignflow run` builds it"
            )
        made: Artifact = do(stage, **inputs)
        return made

    return checked
