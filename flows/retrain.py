"""Run the pipeline again if data, settings or code have changed: on a schedule, on new data, or by hand.

Then go on to promote what was trained, as a run of its own: it may wait for a person for days, and a flow run
that is started inside another one cannot be suspended.
"""

from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment
from prefect.states import Completed

from flows.commands.plan import plan
from flows.display.run_end import describe_end
from flows.pipeline import rlhf
from flows.preflight import check_inputs
from flows.renamed_settings import log_renamed_settings
from flows.run_names import name_retraining
from flows.services.heartbeat import heartbeat
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import ShellSite, StackExchangeDump
from tasks.tracking.client import process_tracker

NO_CHANGE = "Neither data nor settings nor code have changed since the last run: every stage is stored."


@flow(name="retrain", flow_run_name=name_retraining, persist_result=False)
def retrain(config: Pipeline = Pipeline(), profile: str = "rlhf", dump: str = "") -> State:  # noqa: B008
    """Run the chain if its data, its settings or its code have changed since it last ran.

    Args:
        config: Every setting of every stage.
        profile: A name for the run.
        dump: New data of the same kind, read in place of config.source.path; empty: none.
    """
    with heartbeat():
        log_renamed_settings()
        if dump:
            source = (
                StackExchangeDump(path=dump)
                if isinstance(config.source, ShellSite)
                else config.source.model_copy(update={"path": dump})
            )
            config = config.model_copy(update={"source": source})
        check_inputs(config)
        process_tracker().connect()
        if all(stage.action == "reuse" for stage in plan(config)):
            return Completed(name="Cached", message=NO_CHANGE)
        summary = cast(dict[str, Any], rlhf(config, profile=profile))
        if config.promotion.after_retrain:
            _start_promotion(config, profile, run=Path(summary["file"]).parent.name)
        return Completed(message=describe_end(summary), data=summary)


def _start_promotion(config: Pipeline, profile: str, *, run: str) -> None:
    """Start a run of the deployment promote/PROFILE and do not wait for it."""
    name = f"promote/{deployment.name or profile}"
    parameters = {"promotion": config.promotion.model_dump(mode="json"), "profile": profile, "run": run}
    try:
        started = cast(FlowRun, run_deployment(name, parameters=parameters, timeout=0, as_subflow=False))
        get_run_logger().info("The promotion goes on in the flow run %s", started.name)
    except ObjectNotFound:
        text = f"There is no deployment {name}, so nothing is promoted: `alignflow deploy` makes it"
        get_run_logger().warning("%s; `alignflow promote %s` does it by hand", text, run)
