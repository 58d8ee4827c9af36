"""Run the pipeline again if data, settings or code have changed: on a schedule, on new data, or by hand."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.commands.plan import plan
from flows.pipeline import rlhf
from flows.preflight import check_inputs
from flows.renamed_settings import log_renamed_settings
from flows.run_names import name_retraining
from flows.services.heartbeat import heartbeat
from tasks.config.pipeline import Pipeline
from tasks.config.sources import ShellSite, StackExchangeDump
from tasks.tracking.client import process_tracker

NO_CHANGE = "Neither data nor settings nor code have changed since the last run: every stage is stored."


@flow(name="retrain", flow_run_name=name_retraining, persist_result=False)
def retrain(config: Pipeline = Pipeline(), profile: str = "rlhf", dump: str = "") -> State | dict[str, Any]:  # noqa: B008
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
        summary: dict[str, Any] = rlhf(config, profile=profile)
        return summary
