"""Rounds: policy and reward model take turns on fresh comparisons, in one Prefect flow.

Each round is a run of the pipeline, and in MLflow a child of the flow run's own run. A flow run that is
retried finds the rounds' runs again; a command that is started again finds their artifacts in the store.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed

from flows.display.rounds_summary import conclude_rounds, describe_rounds, summarise_round
from flows.display.run_log import logging_events
from flows.display.run_names import name_rounds
from flows.display.run_summary import RunName
from flows.labelling.collecting import collect_labels, find_labels
from flows.pipeline import UNREPORTED, RunStage, chain, list_stages, prepare, run_tracked, started_by
from flows.preflight import check_environment, check_inputs, check_rounds
from flows.renamed_settings import log_renamed_settings
from flows.services.heartbeat import heartbeat
from flows.services.promotions import start_promotion
from flows.stage_runs import NONE_SEEDED, StageRuns
from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.promotion.opponents import find_opponents, read_pin, write_pin
from tasks.rounds.round_runs import round_id
from tasks.rounds.round_walk import (
    Prepared,
    Round,
    collect_candidates,
    finish_round,
    seeded_stages,
    standing_round,
)
from tasks.rounds.verdict import RoundVerdict, best_round, goes_on, judge_round
from tasks.stages.report import report
from tasks.stages.reward import reward
from tasks.stages.stage import Stage
from tasks.system import events
from tasks.tracking import runs
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.run_notes import describe_pipeline
from tasks.tracking.tracked_run import TrackedRun

OPPONENTS = "alignflow.rounds.opponents"  # tag of the flow run's run: whom every round is compared with


class Loop(NamedTuple):
    """What every round of a flow run is given."""

    config: Pipeline
    profile: str
    parent: TrackedRun
    opponents: Mapping[str, Artifact]


class Done(NamedTuple):
    """A finished round: what later rounds know of it, its verdict, and its line in the table of rounds."""

    round: Round
    verdict: RoundVerdict
    line: dict[str, Any]


@flow(name="rounds", flow_run_name=name_rounds, persist_result=True, result_serializer="json")
def rounds(config: Pipeline = Pipeline(), profile: str = "rounds") -> State:  # noqa: B008 - fills Prefect's form
    """Sample answers, ask which is better, train the reward model and then the policy on, and begin again.

    Args:
        config: Every setting of every stage; those of the loop are in the section rounds.
        profile: A name for the run.
    """
    with heartbeat():
        log_renamed_settings()
        check_inputs(config)  # a deployment has had no command line to do so
        check_rounds(config)
        check_environment(config, profile, rounds=True)
        with logging_events():
            summary = _run_rounds(config.model_copy(update={"method": "ppo"}), profile)
        return Completed(message=describe_rounds(summary), data=summary)


def _run_rounds(config: Pipeline, profile: str) -> dict[str, Any]:
    """Run the rounds below a run of their own in MLflow, and start the promotion of the best one."""
    started, settings = time.monotonic(), config.model_dump(mode="json")
    opened = runs.pipeline_run(
        process_tracker(),
        str(flow_run.name or profile),
        settings,
        flow_run_id=str(flow_run.id),
        source=started_by(profile),
        note=describe_pipeline(profile, settings),  # without a profile: it is itself no run of the pipeline
    )
    with opened as parent:
        loop = Loop(config, profile, parent, pin_opponents(parent, config, profile))
        done = [_start(loop)]
        for number in range(1, config.rounds.count + 1):
            done.append(_run_round(loop, number, [one.round for one in done]))
            if not goes_on(done[-1].verdict, config.rounds.stop):
                break
        best = _find_best(done)
        lines = [one.line for one in done]
        summary = conclude_rounds(
            config, profile, lines, best, seconds=time.monotonic() - started, parent=parent
        )
    promote_best(config, profile, best)
    return summary


def _find_best(done: Sequence[Done]) -> Round | None:
    verdicts = {one.round.number: one.verdict for one in done[1:]}
    best = best_round(verdicts, starts_with_policy=done[0].round.policy is not None)
    return None if best is None else done[best].round


def pin_opponents(parent: TrackedRun, config: Pipeline, profile: str) -> dict[str, Artifact]:
    """Return the champion's artifacts, the same ones when a flow run is retried.

    A promotion meanwhile would change the answers of the rounds, and all that is built on them. Raises
    InputError if an opponent of the first attempt is gone.
    """
    if pinned := parent.known.get(OPPONENTS):
        return read_pin(parent.tracker, pinned)
    found = find_opponents(parent.tracker, config.promotion, profile)
    parent.set_tags({OPPONENTS: write_pin(found)})
    return found


def promote_best(config: Pipeline, profile: str, best: Round | None) -> None:
    """Start the promotion of the best round, if this flow run is of a deployment and the settings say so."""
    if config.rounds.promote and deployment.name and best and best.run_id:
        start_promotion(config.promotion, profile, run=best.run_id)


def _start(loop: Loop) -> Done:
    """Build what the first round begins with, as round 0: the SFT model, or a policy trained on votes."""
    walk = partial(_walk_start, loop.config, loop.opponents)
    return _track(loop, 0, lambda stages: walk(stages.run), list_stages(walk), [])


def _walk_start(config: Pipeline, opponents: Mapping[str, Artifact], run: RunStage) -> None:
    if config.rounds.start == "policy":
        chain(config, run, opponents)
        return
    pairs, _, model = prepare(config, run)
    if config.rounds.old_share:  # else no reward model learns from votes
        run(reward, data=pairs, model=model)


def _run_round(loop: Loop, number: int, before: Sequence[Round]) -> Done:
    walk = partial(_walk_round, loop.config, loop.opponents, before)
    names = list_stages(lambda run: walk(lambda _: None, run))

    def walk_labelled(stages: StageRuns) -> None:
        walk(lambda _: _find_labels(loop, number, stages), stages.run)

    return _track(loop, number, walk_labelled, names, before)


def _walk_round(
    config: Pipeline,
    opponents: Mapping[str, Artifact],
    before: Sequence[Round],
    find_labels: Callable[[Any], Artifact | None],
    run: RunStage,
) -> None:
    """Walk the stages of a round; ``find_labels`` is called once the pairs to label are known."""
    prepared = Prepared(*prepare(config, run))
    to_label = collect_candidates(config, prepared, before, run)
    finish_round(config, prepared, before, to_label, find_labels(to_label), run, opponents)


def _find_labels(loop: Loop, number: int, stages: StageRuns) -> Artifact | None:
    """Return the file of labels, for which the run may wait; None if a stage makes them, or has failed."""
    if loop.config.rounds.labels.kind not in ("file", "people"):
        return None
    to_label = stages.wait().built.get("asked")
    if to_label is None:
        return None
    tracked = TrackedRun(stages.context.tracker, stages.context.tracked)
    return collect_labels(loop.config, loop.profile, number, to_label, tracked)


def _track(
    loop: Loop,
    number: int,
    walk: Callable[[StageRuns], None],
    stages: list[str],
    before: Sequence[Round],
) -> Done:
    """Run one round as a run of the pipeline, below the flow run's own; ``stages`` are the names of all."""
    events.tell("round", number=number, count=loop.config.rounds.count)
    finished = run_tracked(
        loop.config,
        loop.profile,
        RunName(round_id(str(flow_run.id), number), f"{flow_run.name}, round {number}"),
        walk,
        stages=stages,
        seeded=seeded_stages(loop.config, number) if number else NONE_SEEDED,
        parent=loop.parent.run_id,
        earlier=_earlier_comparisons(before),
    )
    one, verdict = _judge(number, finished.built, finished.summary["metrics"], finished.run_id, before)
    line = summarise_round(one, verdict, finished.summary)
    events.tell("round_end", number=number, text=line["sentence"])
    return Done(one, verdict, line)


def _earlier_comparisons(before: Sequence[Round]) -> dict[str, Artifact]:
    return {f"comparisons{one.number}": one.comparisons for one in before if one.comparisons}


def _judge(
    number: int,
    built: Mapping[str, Artifact],
    metrics: Mapping[str, Any],
    run_id: str | None,
    before: Sequence[Round],
) -> tuple[Round, RoundVerdict]:
    """Return what later rounds know of a round whose stages are built, and its verdict."""
    standing = standing_round(before)
    verdict = judge_round(metrics, number=number, standing=standing.number if standing else None)
    one = Round(
        number,
        policy=built.get("ppo"),
        reward=built.get("reward"),
        asked=built.get("asked"),
        comparisons=built.get("comparisons"),
        run_id=run_id,
        metrics=metrics,
        has_lost=verdict.outcome == "lost",
    )
    return one, verdict


Look = Callable[[int, Pipeline, Stage, Mapping[str, Artifact]], Artifact]


class Walked(NamedTuple):
    """Where a walk through rounds ends."""

    number: int  # of the last round that was walked
    verdict: RoundVerdict | None  # None: some of its stages are still to be built
    is_last: bool  # no other round follows this one


def walk_rounds(config: Pipeline, profile: str, tracker: Tracker, look: Look) -> Walked:
    """Walk the stages of the rounds without running them, as far as there are artifacts.

    ``look(number, config, stage, inputs)`` returns a stage's artifact in a round, without a digest if it is
    not built: that round is the last one that is walked, since the next one depends on its verdict.
    """
    config = config.model_copy(update={"method": "ppo"})
    opponents = find_opponents(tracker, config.promotion, profile)
    before: list[Round] = []
    for number in range(config.rounds.count + 1):
        built = _look_up_round(config, tracker, opponents, before, partial(look, number))
        if not all(artifact["digest"] for name, artifact in built.items() if name != report.name):
            return Walked(number, None, number == config.rounds.count)
        metrics = {name: value for one in built.values() for name, value in one["metrics"].items()}
        one, verdict = _judge(number, built, metrics, None, before)
        before.append(one)
        if number and not goes_on(verdict, config.rounds.stop):
            break
    return Walked(number, verdict, True)


def _look_up_round(
    config: Pipeline,
    tracker: Tracker,
    opponents: Mapping[str, Artifact],
    before: Sequence[Round],
    look: Callable[[Pipeline, Stage, Mapping[str, Artifact]], Artifact],
) -> dict[str, Artifact]:
    """Return the artifacts of the next round by stage."""
    seeded = seeded_stages(config, len(before)) if before else NONE_SEEDED
    built: dict[str, Artifact] = {}

    def run(stage: Stage, **inputs: Artifact) -> Artifact:
        built[stage.name] = look(seeded.get(stage.name, config), stage, inputs)
        return built[stage.name]

    if before:
        _walk_round(config, opponents, before, partial(find_labels, config, tracker), run)
    else:
        _walk_start(config, opponents, run)
    reported = {name: artifact for name, artifact in built.items() if name not in UNREPORTED}
    run(report, **_earlier_comparisons(before), **reported)
    return built
