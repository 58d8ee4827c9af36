"""From votes to an aligned model: the whole run as one Prefect flow."""

import time
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext
from prefect.runtime import deployment, flow_run

from flows.display.run_log import logging_events
from flows.display.run_summary import conclude, summarise
from flows.preflight import check_inputs
from flows.run_names import name_run
from flows.services.heartbeat import heartbeat
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.base_model import given_base
from tasks.artifacts.corpus import given_corpus
from tasks.config.models import BuiltinBase
from tasks.config.pipeline import Pipeline
from tasks.config.sources import ShellSite
from tasks.execution.run_stage import RunContext
from tasks.stages import data, dpo, merge, ppo, pretrain, reference, report, reward, sft, site, winrate
from tasks.system import events
from tasks.system.errors import InputError
from tasks.tracking import runs
from tasks.tracking.client import process_tracker
from tasks.tracking.remote_artifacts import locate

Do = Callable[..., Artifact]


def chain(config: Pipeline, do: Do) -> None:
    """The stages and what each takes. ``do(stage, **inputs)`` gives a stage's artifact: it runs it, or only looks it up."""
    source = do(site) if isinstance(config.source, ShellSite) else given_corpus(config.source)
    pairs = do(data, source=source)
    base = do(pretrain, data=pairs) if isinstance(config.base, BuiltinBase) else given_base(config.base)
    adapter = do(sft, data=pairs, base=base)
    model = do(merge, base=base, adapter=adapter)
    judge = do(reward, data=pairs, model=model)
    policies = {}
    if config.method in ("ppo", "both"):
        policies["ppo"] = do(ppo, data=pairs, model=model, reward=judge)
    if config.method in ("dpo", "both"):
        policies["dpo"] = do(dpo, data=pairs, model=model, reference=do(reference, data=pairs, model=model))
    do(winrate, data=pairs, model=model, reward=judge, **policies)


def stages_of(config: Pipeline) -> list[str]:
    """Return the names of all stages, in the order in which they run."""
    names: list[str] = []
    chain(config, lambda stage, **_: names.append(stage.run.name))  # type: ignore[arg-type]
    return [*names, report.run.name]


def _started_by(profile: str) -> str:
    """Return the deployment that this flow run is of, or the command that started it."""
    return f"rlhf/{deployment.name}" if deployment.name else f"alignflow run {profile}"


@flow(name="rlhf", flow_run_name=name_run, persist_result=True, result_serializer="json")
def rlhf(config: Pipeline = Pipeline(), profile: str = "rlhf") -> dict[str, Any]:  # noqa: B008 - the form in Prefect's pages is filled from it
    """Score and pair answers, fine-tune, train a reward model, then PPO, DPO or both, and compare.

    Args:
        config: Every setting of every stage.
        profile: A name for the run.
    """
    with heartbeat():
        check_inputs(config)  # a deployment has had no command line to do so
        return _run(config, profile)


def _run(config: Pipeline, profile: str) -> dict[str, Any]:
    started, made = time.monotonic(), {}
    settings = config.model_dump(mode="json")
    run = runs.pipeline_run(
        process_tracker(),
        str(flow_run.name or profile),
        settings,
        flow_run_id=str(flow_run.id),
        profile=profile,
        source=_started_by(profile),
    )
    with logging_events(), run as tracked:
        events.tell("plan", stages=stages_of(config))
        seat = RunContext(
            config.machine,
            tracked.run_id,
            config.pools,
            shared=bool(config.pools.cpu or config.pools.gpu),
            tracker=tracked.tracker,
        )
        if seat.shared and not tracked.is_on:
            raise InputError(
                "Workers find each other's artifacts in MLflow, which is not reachable: set MLFLOW_TRACKING_URI, or leave pools.* empty"
            )

        def do(stage: Any, **inputs: Any) -> Any:
            made[stage.run.name] = stage.run(config, seat=seat, **inputs)
            if context := FlowRunContext.get():
                context.run_results.clear()  # Prefect also knows results by their id(), and draws false edges when Python reuses one
            return made[stage.run.name]

        chain(config, do)
        do(report, **made)
        artifacts = [state.result() for state in made.values()]
        summary = summarise(profile, artifacts, time.monotonic() - started)
        page = locate(artifacts[-1], tracked.tracker) / "report.html"
        return conclude(config, summary, page, run_id=str(flow_run.id), tracked=tracked)
