"""Find everything that was built on a label."""

from typing import Any

from tasks.artifacts.artifact import only, stage_artifact
from tasks.promotion.finished_runs import find_manifest
from tasks.promotion.lineage import Graph, Node, describe_learners
from tasks.system.errors import InputMissing
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate

STAGE, TABLE = "comparisons", "labels.parquet"


def trace_labels(tracker: Tracker, graph: Graph, labels: set[str]) -> list[dict[str, Any]]:
    """Return, for each artifact of comparisons that was made from one of these labels (ids), what was built
    on it.

    An artifact whose table is gone cannot be searched, and counts as one that has them.
    """
    found = []
    for node in [node for node in graph.nodes.values() if node.stage == STAGE]:
        held = _read_labels(tracker, node)
        if held is None or held & labels:
            built = [node, *graph.descendants([node.digest])]
            found.append(
                {
                    "comparisons": {"key": node.key, "digest": node.digest},
                    "is_searched": held is not None,
                    "labels": sorted(held & labels) if held else [],
                    **describe_learners(tracker, built),
                }
            )
    return found


def _read_labels(tracker: Tracker, node: Node) -> set[str] | None:
    """Return the ids of the labels that comparisons were made from; None if their table is gone."""
    import pyarrow.parquet as pq

    manifest = find_manifest(tracker, STAGE, node.key)
    if manifest is None or TABLE not in manifest["files"]:
        return None
    artifact = stage_artifact(manifest, {}, cached=True, seconds=0.0)
    try:
        folder = locate(only(artifact, TABLE), tracker)
    except InputMissing:
        return None
    return set(pq.read_table(folder / TABLE, columns=["label_id"])["label_id"].to_pylist())
