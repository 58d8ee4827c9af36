"""Run the pipeline again if data, settings, code or the champion have changed: on a schedule, on new data, or
by hand.

Then go on to promote what was trained, as a run of its own: it may wait for a person for days, and a flow run
that is started inside another one cannot be suspended.
"""

from pathlib import Path
from typing import Any, cast

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.commands.plan import Planned, plan
from flows.display.run_end import describe_end
from flows.display.run_names import name_retraining
from flows.pipeline import rlhf
from flows.preflight import check_inputs
from flows.renamed_settings import log_renamed_settings
from flows.services.heartbeat import heartbeat
from flows.services.promotions import start_promotion
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import ShellSite, StackExchangeDump
from tasks.promotion.finished_runs import find_run
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker, process_tracker

# a tag of runs that a retraining has built, and its values
PROMOTION, DUE, STARTED = "alignflow.promotion.flow", "due", "started"
NO_CHANGE = "No data, setting, code or champion has changed since the last run: every stage is stored."


@flow(name="retrain", flow_run_name=name_retraining, persist_result=False)
def retrain(config: Pipeline = Pipeline(), profile: str = "rlhf", dump: str = "") -> State:  # noqa: B008
    """Run the chain if its data, its settings, its code or the champion have changed since it last ran.

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
        tracker = process_tracker()
        tracker.connect()
        planned = plan(config, profile, fetch=True)
        if all(stage.action == "reuse" for stage in planned):
            if config.promotion.after_retrain and (run := _find_unproposed(tracker, profile, planned)):
                _promote(config, profile, run=run)
            return Completed(name="Cached", message=NO_CHANGE)
        summary = cast(dict[str, Any], rlhf(config, profile=profile))
        if config.promotion.after_retrain:
            run = Path(summary["file"]).parent.name
            _mark(run, DUE)  # so that it is started later, if it cannot be now
            _promote(config, profile, run=run)
        return Completed(message=describe_end(summary), data=summary)


def _find_unproposed(tracker: Tracker, profile: str, planned: list[Planned]) -> str:
    """Return the id of the profile's newest run if a retraining built it and could not start its promotion.

    "" if there is none, or if it has other artifacts than these.
    """
    if not tracker.is_up:
        return ""
    try:
        newest = find_run(tracker, profile=profile)
    except InputError:  # no run was tracked
        return ""
    except Exception as error:  # of MLflow; everything is stored, so the retraining does not fail
        get_run_logger().warning("The newest run could not be read (%s): nothing is promoted", error)
        return ""
    is_same = all(newest.stages.get(one.stage, {}).get("key") == one.key for one in planned)
    return newest.run_id if is_same and newest.tags.get(PROMOTION) == DUE else ""


def _mark(run: str, value: str) -> None:
    """Say in MLflow how far the promotion of a run is; nothing is lost if that fails."""
    tracker = process_tracker()
    if not tracker.is_up:
        return
    try:
        tracker.set_tags(find_run(tracker, run).run_id, {PROMOTION: value})
    except Exception as error:
        get_run_logger().warning(
            "MLflow does not know that the promotion of %s is %s (%s)", run, value, error
        )


def _promote(config: Pipeline, profile: str, *, run: str) -> None:
    """Start the promotion of a run, and mark it; if that fails the next retraining tries again."""
    if start_promotion(config.promotion, profile, run=run):
        _mark(run, STARTED)
    else:
        get_run_logger().warning("The next retraining tries again to promote %s", run)
