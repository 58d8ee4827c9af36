"""Prepare finished runs for a comparison: find them and their artifacts, and list what differs in them."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from tasks.artifacts.artifact import Artifact, only, stage_artifact
from tasks.artifacts.store import flatten
from tasks.config.commands.comparison import ComparedRun, Comparison
from tasks.config.policies import POLICIES
from tasks.promotion.comparing_judge import ChosenJudge, add_judge, choose_judge, identify_judges
from tasks.promotion.finished_runs import NAME, FinishedRun, find_manifest, find_unique_run
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate
from tasks.tracking.run_origin import COMMIT

MOST_RUNS = 26  # each is named by a letter
READ = ("answers", "winrate", "benchmarks")  # stages whose artifacts are compared; only answers are needed
ANSWERS = "answers.parquet"
NO_RESULT = ("machine.", "pools.", "promotion.")  # settings that change no figure
SHORT = 12  # characters of digests and commits


class Chosen(NamedTuple):
    """A run that the user has named, and those of its policies that are judged."""

    run: FinishedRun
    policies: tuple[str, ...]


class Prepared(NamedTuple):
    """What the stage compare takes: its settings and artifacts."""

    comparison: Comparison
    artifacts: dict[str, Artifact]


def find_compared(tracker: Tracker, names: Sequence[str]) -> list[Chosen]:
    """Return the runs that RUN or RUN:POLICY,... name, the oldest first. Raises InputError.

    The order in which they are named changes nothing.
    """
    if not 2 <= len(names) <= MOST_RUNS:
        raise InputError(f"Name 2 to {MOST_RUNS} runs to compare, not {len(names)}")
    chosen = [_choose(tracker, name) for name in names]
    return sorted(chosen, key=lambda one: (one.run.summary.get("finished", 0), one.run.run_id, one.policies))


def _choose(tracker: Tracker, text: str) -> Chosen:
    """Return the run and the policies that a text names; a run's name may contain colons itself."""
    name, colon, listed = text.rpartition(":")
    wanted = tuple(listed.split(","))
    if not colon or not set(wanted) <= {*POLICIES}:
        name, wanted = text, ()
    run = find_unique_run(tracker, name)
    answered = [one for one in POLICIES if f"{one}.length" in run.summary["metrics"]]
    if "answers" not in run.stages or not answered:
        raise InputError(f"The run {name} has no answers to compare: its stage answers was not built")
    missing = [one for one in wanted if one not in answered]
    if missing:
        raise InputError(f"The run {name} has no {' or '.join(missing)}; it has {', '.join(answered)}")
    return Chosen(run, tuple(one for one in answered if one in wanted or not wanted))


def prepare(tracker: Tracker, chosen: Sequence[Chosen], judge: str) -> Prepared:
    """Return what the stage compare takes; ``judge`` is "" for none, else KIND or KIND:RUN.

    Raises InputError.
    """
    compared = describe_runs(chosen)
    artifacts = {
        f"{stage}{number}": artifact
        for number, one in enumerate(chosen, start=1)
        for stage in READ
        if (artifact := _find(tracker, one.run, stage, needed=stage == "answers"))
    }
    if not judge:
        return Prepared(Comparison(runs=tuple(compared)), artifacts)
    decides = choose_judge(tracker, [one.run for one in chosen], judge)
    _require_shared_questions(tracker, [artifacts[f"answers{n}"] for n in range(1, len(chosen) + 1)])
    return Prepared(add_judge(compared, decides), artifacts | _judge_artifacts(tracker, decides))


def describe_runs(chosen: Sequence[Chosen]) -> list[ComparedRun]:
    """Return what the comparison shows of each run."""
    differences = list_differences([one.run for one in chosen])
    return [
        ComparedRun(
            run_id=run.run_id,
            name=run.tags.get(NAME, run.run_id),
            settings=settings,
            metrics=run.summary["metrics"],
            warnings=tuple(f"{name}: {text}" for name, one in run.stages.items() for text in one["warnings"]),
            judges=identify_judges(run),
            policies=policies,
        )
        for (run, policies), settings in zip(chosen, differences, strict=True)
    ]


def list_differences(runs: Sequence[FinishedRun]) -> list[dict[str, str]]:
    """Return for each run the settings in which the runs differ, and the same of their data and code."""
    known = [_facts(run) for run in runs]
    names = dict.fromkeys(name for facts in known for name in facts)
    differing = [name for name in names if len({facts.get(name, "") for facts in known}) > 1]
    return [{name: facts.get(name, "") for name in differing} for facts in known]


def _facts(run: FinishedRun) -> dict[str, str]:
    settings = flatten(run.settings)
    facts = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.items()
        if not name.startswith(NO_RESULT)
    }
    data = run.stages["data"]["digest"][:SHORT] if "data" in run.stages else ""
    return facts | {"digest of the data": data, "commit": run.tags.get(COMMIT, "")[:SHORT]}


def _require_shared_questions(tracker: Tracker, answers: Sequence[Artifact]) -> None:
    """Refuse to have a judge decide between runs that share no question. Raises InputError."""
    import pyarrow.parquet as pq

    asked = []
    for artifact in answers:
        path = locate(only(artifact, ANSWERS), tracker) / ANSWERS
        columns = pq.read_table(path, columns=["question_id", "question"]).to_pydict()
        asked.append(set(zip(*columns.values(), strict=True)))
    if not set.intersection(*asked):
        raise InputError("The runs share no held-out question, so no judge can decide between their answers")


def _judge_artifacts(tracker: Tracker, judge: ChosenJudge) -> dict[str, Artifact]:
    """Return the artifacts of a reward model that judges. Raises InputError."""
    found = {}
    if judge.kind in ("held_out", "reward"):
        for role, stage in (("model", "merge"), ("reward", "reward")):
            artifact = _find(tracker, judge.owner, stage, needed=True)
            assert artifact
            found[role] = artifact
    return found


def _find(tracker: Tracker, run: FinishedRun, stage: str, *, needed: bool) -> Artifact | None:
    """Return an artifact of a run from this machine or MLflow. Raises InputError if it is needed and gone."""
    manifest = find_manifest(tracker, stage, run.stages[stage]["key"]) if stage in run.stages else None
    if manifest:
        return stage_artifact(manifest, {}, cached=True, seconds=0.0)
    if needed:
        raise InputError(
            f"The artifact {stage} of the run {run.tags.get(NAME, run.run_id)} is neither in this home nor "
            "in MLflow: `alignflow run` with its settings builds it again"
        )
    return None
