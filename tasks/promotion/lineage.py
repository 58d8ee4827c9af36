"""Say what a model was made from, and what was made from some data.

Artifacts are known by the manifests on this machine and by the tags of the runs in MLflow that have built
them. An artifact depends on those that its manifest names by digest; a digest that no stage has built is what
the user brought: the raw data, or a base model.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from tasks.artifacts.inventory import list_artifacts
from tasks.artifacts.store import home
from tasks.promotion.finished_runs import find_manifest
from tasks.tracking.client import Tracker
from tasks.tracking.registry import ModelVersion, list_versions
from tasks.tracking.run_origin import COMMIT
from tasks.tracking.runs import INPUTS, finished_stage_runs
from tasks.tracking.tracked_run import DIGEST, KEY

MODELS = ("pretrain", "sft", "merge", "reward", "ppo", "dpo")  # stages whose artifacts have learnt


class Node(NamedTuple):
    """An artifact of a stage."""

    stage: str
    key: str
    digest: str
    inputs: Mapping[str, str]  # digest of the whole artifact by the name of the input
    seed: str
    commit: str  # "" if the code was not run from a repository

    @property
    def has_learnt(self) -> bool:
        """Whether it holds weights that were trained on its inputs."""
        return self.stage in MODELS


class Graph:
    """All artifacts that this machine or MLflow knows, with what each was built from."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {(node.stage, node.key): node for node in nodes}
        self.by_digest: dict[str, list[Node]] = defaultdict(list)
        self.takers: dict[str, list[Node]] = defaultdict(list)  # by the digest that they take
        for node in self.nodes.values():
            self.by_digest[node.digest].append(node)
            for digest in set(node.inputs.values()):
                self.takers[digest].append(node)

    def find_digests(self, prefix: str) -> list[str]:
        """Return the digests that begin with a text, and those of artifacts whose key does."""
        known = {*self.by_digest, *self.takers}
        found = {digest for digest in known if digest.startswith(prefix)}
        found |= {node.digest for node in self.nodes.values() if node.key.startswith(prefix)}
        return sorted(found)

    def descendants(self, digests: Iterable[str]) -> list[Node]:
        """Return every artifact that was built from these digests, also indirectly, without themselves."""
        pending, reached = list(digests), dict[tuple[str, str], Node]()
        while pending:
            for node in self.takers[pending.pop()]:
                if (node.stage, node.key) not in reached:
                    reached[node.stage, node.key] = node
                    pending.append(node.digest)
        return list(reached.values())


def load_graph(tracker: Tracker) -> Graph:
    """Return the graph of all artifacts on this machine and in MLflow."""
    found = {(node.stage, node.key): node for node in _tracked(tracker)}
    for entry in list_artifacts(home()):
        if entry.digest and entry.stage != "given":
            tracked = found.get((entry.stage, entry.key))
            manifest = json.loads((entry.path / "manifest.json").read_text())
            found[entry.stage, entry.key] = Node(
                stage=entry.stage,
                key=entry.key,
                digest=entry.digest,
                inputs=manifest.get("origins", {}),
                seed=str(manifest["job"].get("seed", "")),
                commit=tracked.commit if tracked else "",
            )
    return Graph(found.values())


def _tracked(tracker: Tracker) -> Iterable[Node]:
    """Yield the artifacts that runs in MLflow have built."""
    for run in finished_stage_runs(tracker):
        tags = run.tags
        if tags["stage"] == "given":
            continue
        inputs = json.loads(tags[INPUTS]) if INPUTS in tags else None
        if inputs is None:  # of an earlier version, which has not set the tag
            manifest = find_manifest(tracker, tags["stage"], tags[KEY])
            inputs = manifest["origins"] if manifest else {}
        yield Node(
            stage=tags["stage"],
            key=tags[KEY],
            digest=tags[DIGEST],
            inputs=inputs,
            seed=run.params.get("seed", ""),
            commit=tags.get(COMMIT, ""),
        )


def trace_version(graph: Graph, version: ModelVersion) -> dict[str, Any]:
    """Return everything that a model version was made from, as a tree of plain values.

    An artifact that is an input several times has its own inputs the first time only.
    """
    key, policy = version.tags.get(KEY, ""), version.tags.get("policy", "")
    node = graph.nodes.get((policy, key))
    top: dict[str, Any] = {
        "model": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "run": version.tags.get("run", version.run_id),
        "licence": version.tags.get("licence", ""),
    }
    return top | {"policy": _trace(graph, node, set()) if node else {"stage": policy, "key": key}}


def _trace(graph: Graph, node: Node, seen: set[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "stage": node.stage,
        "key": node.key,
        "digest": node.digest,
        "seed": node.seed,
        "commit": node.commit,
    }
    if node.key in seen:
        return facts | {"repeated": True}
    seen.add(node.key)
    inputs = {}
    for name, digest in sorted(node.inputs.items()):
        built = graph.by_digest.get(digest)
        inputs[name] = _trace(graph, built[0], seen) if built else {"stage": "given", "digest": digest}
    return facts | {"inputs": inputs}


def raw_digests(trace: dict[str, Any]) -> dict[str, str]:
    """Return the digests of what the user brought, by the input's name, in a tree of `trace_version`."""
    found: dict[str, str] = {}
    for name, taken in trace.get("inputs", {}).items():
        found |= {name: taken["digest"]} if taken["stage"] == "given" else raw_digests(taken)
    return found


def find_learners(tracker: Tracker, graph: Graph, digests: list[str]) -> dict[str, Any]:
    """Return the artifacts that were built from data with these digests, and the versions that learnt."""
    itself = [node for digest in digests for node in graph.by_digest[digest]]
    return {"digests": digests, **describe_learners(tracker, [*itself, *graph.descendants(digests)])}


def describe_learners(tracker: Tracker, nodes: list[Node]) -> dict[str, Any]:
    """Return artifacts apart by whether they have learnt, and the model versions among them."""
    keys = {node.key for node in nodes if node.has_learnt}
    versions = [one for one in list_versions(tracker) if one.tags.get(KEY) in keys]
    return {
        "learnt": [_name(node) for node in nodes if node.has_learnt],
        "derived": [_name(node) for node in nodes if not node.has_learnt],
        "versions": [
            {"model": one.name, "version": one.version, "aliases": list(one.aliases)} for one in versions
        ],
    }


def _name(node: Node) -> dict[str, str]:
    return {"stage": node.stage, "key": node.key, "digest": node.digest}
