"""From votes to an aligned model: the whole run as one Prefect flow."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from flows.display.run_end import describe_end
from flows.display.run_log import logging_events
from flows.display.run_names import name_run
from flows.display.run_summary import RunName, conclude, summarise
from flows.failures import RunFailed, describe_failure
from flows.preflight import check_environment, check_inputs
from flows.renamed_settings import log_renamed_settings
from flows.services.heartbeat import heartbeat
from flows.services.prefect_workarounds import true_edges
from flows.stage_runs import NONE_SEEDED, Outcome, StageRuns, stopping_threads
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.base_model import base_artifact
from tasks.artifacts.corpus import corpus_artifact
from tasks.artifacts.store import explain_rebuilds
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import BuiltinBase
from tasks.config.sections.sources import ShellSite
from tasks.execution.run_stage import RunContext
from tasks.promotion.opponents import find_opponents
from tasks.stages.answers import answers
from tasks.stages.benchmarks import benchmarks
from tasks.stages.data import data
from tasks.stages.dpo import dpo
from tasks.stages.merge import merge
from tasks.stages.ppo import ppo
from tasks.stages.pretrain import pretrain
from tasks.stages.reference import reference
from tasks.stages.report import report
from tasks.stages.reward import reward
from tasks.stages.sft import sft
from tasks.stages.site import site
from tasks.stages.stage import Stage
from tasks.stages.winrate import winrate
from tasks.system import events
from tasks.system.errors import InputError, StageFailed
from tasks.tracking import runs
from tasks.tracking.client import process_tracker
from tasks.tracking.remote_artifacts import locate
from tasks.tracking.tracked_run import TrackedRun

NO_ARTIFACTS: Mapping[str, Artifact] = MappingProxyType({})
UNREPORTED = frozenset({"candidates", "asked", "mixture"})  # tables that no page shows
COMMAND_OF = {"rlhf": "run", "rounds": "rounds"}  # by flow


class RunStage(Protocol):
    """What ``chain`` does with each stage."""

    def __call__(self, stage: Stage, **inputs: Any) -> Any:
        """Return the stage's artifact, or what Prefect passes on in its place."""


def chain(config: Pipeline, run: RunStage, opponents: Mapping[str, Artifact] = NO_ARTIFACTS) -> None:
    """Walk the stages. ``run(stage, **inputs)`` returns a stage's artifact, or a promise of it.

    A stage waits for its inputs alone: those that do not wait for each other may run at the same time.
    ``opponents`` are the champion's artifacts, as ``find_opponents`` returns them.
    """
    pairs, base, model = prepare(config, run)
    reward_model = run(reward, data=pairs, model=model)
    policies = {}
    if config.method in ("ppo", "both"):
        policies["ppo"] = run(ppo, data=pairs, model=model, reward=reward_model)
    if config.method in ("dpo", "both"):
        log_probs = run(reference, data=pairs, model=model)
        policies["dpo"] = run(dpo, data=pairs, model=model, reference=log_probs)
    answered = run(answers, data=pairs, base=base, model=model, **policies, **opponents)
    run(winrate, data=pairs, model=model, reward=reward_model, answers=answered)
    run(benchmarks, data=pairs, base=base, model=model, reward=reward_model, **policies)


def prepare(config: Pipeline, run: RunStage) -> tuple[Any, Any, Any]:
    """Walk the stages up to the SFT model; return what data, base and SFT model every policy starts from."""
    source = run(site) if isinstance(config.source, ShellSite) else corpus_artifact(config.source)
    pairs = run(data, source=source)
    base = run(pretrain, data=pairs) if isinstance(config.base, BuiltinBase) else base_artifact(config.base)
    adapter = run(sft, data=pairs, base=base)
    return pairs, base, run(merge, base=base, adapter=adapter)


def stages_of(config: Pipeline) -> list[str]:
    """Return the names of all stages of the chain, in the order in which they run."""
    return list_stages(partial(chain, config))


def list_stages(walk: Callable[[RunStage], None]) -> list[str]:
    """Return the names of the stages that a walk runs, in their order, and that of the report."""
    names: list[str] = []
    walk(lambda stage, **_: names.append(stage.name))
    return [*names, report.name]


@flow(name="rlhf", flow_run_name=name_run, persist_result=True, result_serializer="json")
def rlhf(config: Pipeline = Pipeline(), profile: str = "rlhf") -> State:  # noqa: B008 - the form in Prefect's pages is filled from it
    """Score and pair answers, fine-tune, train a reward model, then PPO, DPO or both, and compare.

    Args:
        config: Every setting of every stage.
        profile: A name for the run.
    """
    with heartbeat():
        log_renamed_settings()
        check_inputs(config)  # a deployment has had no command line to do so
        check_environment(config, profile)
        with logging_events():
            run = RunName(str(flow_run.id), str(flow_run.name or ""))
            walk = partial(_walk_chain, config, profile)
            summary = run_tracked(config, profile, run, walk, stages=stages_of(config)).summary
        return Completed(message=describe_end(summary), data=summary)


def _walk_chain(config: Pipeline, profile: str, stages: StageRuns) -> None:
    chain(config, stages.run, find_opponents(stages.context.tracker, config.promotion, profile))


class Finished(NamedTuple):
    """A tracked run whose stages were all built."""

    summary: dict[str, Any]
    built: dict[str, Artifact]  # by stage
    run_id: str | None  # in MLflow; None: it was not tracked


def run_tracked(
    config: Pipeline,
    profile: str,
    run: RunName,
    walk: Callable[[StageRuns], None],
    *,
    stages: list[str],
    seeded: Mapping[str, Pipeline] = NONE_SEEDED,
    parent: str | None = None,
    earlier: Mapping[str, Artifact] = NO_ARTIFACTS,
) -> Finished:
    """Run the stages that ``walk`` starts, and the report on them, as one run of the pipeline in MLflow.

    ``stages`` are the names of all, in their order; ``seeded`` are the settings of those that draw with
    a seed of their own; ``parent`` is the run in MLflow that this one belongs to, and ``earlier`` what the
    report names of earlier ones. Raises RunFailed, after the report on what was built, and an error that no
    stage raises on purpose as it is.
    """
    started = time.monotonic()
    opened = runs.pipeline_run(
        process_tracker(),
        run.name or profile,
        config.model_dump(mode="json"),
        flow_run_id=run.id,
        profile=profile,
        source=started_by(profile),
        parent=parent,
    )
    with opened as tracked:
        events.tell("plan", stages=stages)
        if text := explain_rebuilds(stages):
            events.tell("warning", text=text)
        outcome = _run_stages(StageRuns(config, _context(config, tracked), seeded=seeded), walk, earlier)
        summary = None
        if "report" in outcome.built:
            seconds = time.monotonic() - started
            failed = {name: describe_failure(name, error) for name, error in outcome.failed.items()}
            built = list(outcome.built.values())
            found = summarise(profile, built, seconds, failed=failed, not_run=outcome.not_run)
            page = locate(outcome.built["report"], tracked.tracker) / "report.html"
            summary = conclude(config, found, page, run=run, tracked=tracked)
        if outcome.failed:
            raise _failure(outcome, summary)
        assert summary is not None
        return Finished(summary, outcome.built, tracked.run_id)


def started_by(profile: str) -> str:
    """Return the deployment that this flow run is of, or the command that started it."""
    name = str(flow_run.flow_name)
    return (
        f"{name}/{deployment.name}"
        if deployment.name
        else f"alignflow {COMMAND_OF.get(name, name)} {profile}"
    )


def _context(config: Pipeline, tracked: TrackedRun) -> RunContext:
    """Return where the stages run and are tracked. Raises InputError."""
    pools = config.pools
    shared = bool(pools.cpu or pools.gpu)
    context = RunContext(config.machine, tracked.run_id, pools, shared=shared, tracker=tracked.tracker)
    if context.shared and not tracked.is_on:
        raise InputError(
            "Workers find each other's artifacts in MLflow, which is not reachable: set MLFLOW_TRACKING_URI, "
            "or leave pools.* empty"
        )
    return context


def _run_stages(
    stages: StageRuns, walk: Callable[[StageRuns], None], earlier: Mapping[str, Artifact]
) -> Outcome:
    """Run the stages that ``walk`` starts, and the report on what they built."""
    with stopping_threads(), true_edges():
        walk(stages)
        for name, causes in stages.wait().not_run.items():
            events.tell("not_run", name, causes=causes)
        ends = {name: end for name, end in stages.ends.items() if name not in UNREPORTED}
        stages.run(report, **earlier, **ends)
        return stages.wait()


def _failure(outcome: Outcome, summary: dict[str, Any] | None) -> Exception:
    """Return what the run ends with: an error that no stage raises on purpose as it is, for its traceback."""
    unforeseen = [
        error for error in outcome.failed.values() if not isinstance(error, InputError | StageFailed)
    ]
    return unforeseen[0] if unforeseen else RunFailed(outcome.failed, summary)
