"""Find everything that was built on a label, and what was found of those who gave it."""

import json
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import only, stage_artifact
from tasks.promotion.finished_runs import find_manifest
from tasks.promotion.lineage import Graph, Node, describe_learners
from tasks.system.errors import InputMissing
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate

STAGE, TABLE, AGREEMENT = "comparisons", "labels.parquet", "agreement.json"


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

    path = _locate(tracker, node, TABLE)
    return set(pq.read_table(path, columns=["label_id"])["label_id"].to_pylist()) if path else None


def _locate(tracker: Tracker, node: Node, name: str) -> Path | None:
    """Return a file of an artifact of comparisons on this machine; None if it is gone."""
    manifest = find_manifest(tracker, STAGE, node.key)
    if manifest is None or name not in manifest["files"]:
        return None
    artifact = stage_artifact(manifest, {}, cached=True, seconds=0.0)
    try:
        return locate(only(artifact, name), tracker) / name
    except InputMissing:
        return None


def read_agreement(tracker: Tracker, graph: Graph, frozen: str) -> dict[str, Any] | None:
    """Return what the comparisons of a frozen file of labels (by its digest) say of the raters.

    None if there are no comparisons of it.
    """
    nodes = [node for node in graph.takers.get(frozen, ()) if node.stage == STAGE]
    for node in nodes:
        if path := _locate(tracker, node, AGREEMENT):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    return None
