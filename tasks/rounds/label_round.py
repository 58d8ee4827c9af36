"""Find the rounds whose pairs people label, by the tags of their runs in MLflow.

A round is known by the key of its artifact of asked pairs. A command that is started again makes another run
in MLflow with the same key; all runs with a key are one round, and share its labels.
"""

from typing import Any, NamedTuple

from tasks.artifacts.artifact import only, stage_artifact
from tasks.promotion.finished_runs import NAME, find_manifest
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate
from tasks.tracking.runs import MAX_ALL_RUNS, PROFILE
from tasks.tracking.tracked_run import TrackedRun

ASKED = "alignflow.rounds.asked"  # key of the artifact of asked pairs
NUMBER = "alignflow.rounds.number"
FLOW = "alignflow.rounds.flow_run"  # id in Prefect of the run that waits; "" if it ended with exit status 3
OVERLAP = "alignflow.rounds.overlap"  # share of the pairs that a second rater labels too
LEAST = "alignflow.rounds.least"  # labels without which the round does not go on
ENOUGH = "alignflow.rounds.enough"  # who has said that the round goes on with the labels that there are
FROZEN = "alignflow.rounds.frozen"  # digest of the file of labels that the round was built on


class LabelRound(NamedTuple):
    """A round whose pairs people label."""

    key: str  # of its asked pairs
    profile: str
    number: int
    run_ids: tuple[str, ...]  # in MLflow, newest first
    names: tuple[str, ...]  # of these runs
    flow_run: str
    overlap: float
    least: int
    enough: str
    frozen: str

    @property
    def title(self) -> str:
        """Return the round's name in sentences."""
        return f"round {self.number} of {self.profile}"


def open_round(
    tracked: TrackedRun, asked_key: str, *, number: int, flow_run: str, overlap: float, least: int
) -> None:
    """Mark a run in MLflow as that of a round whose pairs are to be labelled. Raises what MLflow raises."""
    tags = {
        ASKED: asked_key,
        NUMBER: str(number),
        FLOW: flow_run,
        OVERLAP: str(overlap),
        LEAST: str(least),
    }
    tracked.tracker.set_tags(str(tracked.run_id), tags)


def list_rounds(tracker: Tracker) -> list[LabelRound]:
    """Return all rounds that people label or have labelled, newest first."""
    runs_by_key: dict[str, list[Any]] = {}
    for run in tracker.search(f"tags.`{ASKED}` LIKE '%'", limit=MAX_ALL_RUNS):
        runs_by_key.setdefault(run.tags[ASKED], []).append(run)
    return [_as_round(key, runs) for key, runs in runs_by_key.items()]


def _as_round(key: str, runs: list[Any]) -> LabelRound:
    tags = runs[0].tags
    return LabelRound(
        key=key,
        profile=tags.get(PROFILE, ""),
        number=int(tags[NUMBER]),
        run_ids=tuple(run.run_id for run in runs),
        names=tuple(run.tags.get(NAME, "") for run in runs),
        flow_run=tags.get(FLOW, ""),
        overlap=float(tags.get(OVERLAP, 0.0)),
        least=int(tags.get(LEAST, 1)),
        enough=next((run.tags[ENOUGH] for run in runs if run.tags.get(ENOUGH)), ""),
        frozen=next((run.tags[FROZEN] for run in runs if run.tags.get(FROZEN)), ""),
    )


def find_round(tracker: Tracker, name: str = "") -> LabelRound:
    """Return the newest round of a profile, or the one with this run (id or name) or key of asked pairs.

    "" is the newest of all; of several, one that waits for labels comes first. Raises InputError.
    """
    known = list_rounds(tracker)
    found = [one for one in known if not name or _is_called(one, name)]
    if not found:
        of_name = f" that {name!r} names" if name else ""
        raise InputError(
            f"There is no round{of_name} whose pairs people label: `alignflow rounds PROFILE --set "
            "rounds.labels.kind=people` comes to one"
        )
    return next((one for one in found if not one.frozen), found[0])


def _is_called(one: LabelRound, name: str) -> bool:
    is_id = len(name) >= 6 and any(text.startswith(name) for text in (one.key, *one.run_ids))
    return is_id or name == one.profile or name in one.names


def read_asked(tracker: Tracker, key: str) -> list[dict[str, Any]]:
    """Return the pairs of an artifact of asked pairs, in their order. Raises InputMissing and InputError."""
    import pyarrow.parquet as pq

    manifest = find_manifest(tracker, "asked", key)
    if manifest is None:
        raise InputError(
            f"The pairs of the round (asked {key[:12]}) are neither on this machine nor in MLflow"
        )
    artifact = stage_artifact(manifest, {}, cached=True, seconds=0.0)
    folder = locate(only(artifact, "asked.parquet"), tracker)
    rows: list[dict[str, Any]] = pq.read_table(folder / "asked.parquet").to_pylist()
    return rows
