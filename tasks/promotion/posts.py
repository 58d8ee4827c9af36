"""Find a post of the source in the data stage's tables, and the models that have learnt from it."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.artifact import only, stage_artifact
from tasks.artifacts.store import Manifest
from tasks.promotion.finished_runs import find_manifest
from tasks.promotion.lineage import Graph, Node, describe_learners
from tasks.system.errors import InputMissing
from tasks.system.hashing import digest_of
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate

EVALUATION = ("evaluation", "evaluation_pairs")  # tables that no weights are trained on
TABLE = ".parquet"
LINKS = ("question_url", "answer_url", "chosen_url", "rejected_url")
BATCH_ROWS = 8192


class Place(NamedTuple):
    """Where a post is in an artifact of the data stage."""

    table: str
    rows: int
    sites: tuple[str, ...]
    roles: tuple[str, ...]  # question, answer, chosen or rejected

    @property
    def is_learnt_from(self) -> bool:
        """Whether models are trained on the table."""
        return self.table not in EVALUATION


def trace_post(tracker: Tracker, graph: Graph, post: str) -> list[dict[str, Any]]:
    """Return, for each artifact of the data stage that has the post, its splits and what has learnt from it.

    Posts are found by their link, or by the id of their question if rows have no links. A post that is in the
    evaluation split alone was not learnt from. An artifact whose tables are gone cannot be searched, and
    counts as one that has the post: all that was made from it is named.
    """
    found = []
    for node in [node for node in graph.nodes.values() if node.stage == "data"]:
        manifest = find_manifest(tracker, "data", node.key)
        tables = _locate_tables(tracker, manifest) if manifest else None
        if manifest is None or tables is None:
            found.append(_describe_unsearched(tracker, graph, node))
        elif places := find_post(tables, post):
            found.append(_describe(tracker, graph, node, manifest, places))
    return found


def _locate_tables(tracker: Tracker, manifest: Manifest) -> Path | None:
    """Return the folder of an artifact of the data stage with all its tables; None if one is gone."""
    artifact = stage_artifact(manifest, {}, cached=True, seconds=0.0)
    tables = [name for name in manifest["files"] if name.endswith(TABLE)]
    try:
        return locate(only(artifact, *tables), tracker)
    except InputMissing:
        return None


def find_post(folder: Path, post: str) -> list[Place]:
    """Return the tables of an artifact of the data stage in which a post is."""
    found = (_search(path, post) for path in sorted(folder.glob(f"*{TABLE}")))
    return [place for place in found if place.rows]


def _search(path: Path, post: str) -> Place:
    """Search one table, of which only ids and links are read."""
    import pyarrow.parquet as pq

    link = re.compile(rf"/(a|q|answers|questions)/{re.escape(post)}(?!\d)")
    rows, sites, roles = 0, set[str](), set[str]()
    with pq.ParquetFile(path) as file:
        present = file.schema_arrow.names
        columns = [name for name in ("question_id", "site", *LINKS) if name in present]
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                its_roles = _roles(row, post, link)
                if its_roles:
                    rows += 1
                    roles |= its_roles
                    sites.add(row.get("site") or "")
    return Place(path.stem, rows, tuple(sorted(sites)), tuple(sorted(roles)))


def _roles(row: dict[str, Any], post: str, link: re.Pattern[str]) -> set[str]:
    """Return the roles in which a post is in a row: by its links, or by the id if there are no links."""
    roles = set()
    for column in LINKS:
        urls = row.get(column) or ()
        if any(link.search(url) for url in ([urls] if isinstance(urls, str) else urls)):
            roles.add(column.removesuffix("_url"))
    if not row.get("question_url") and str(row.get("question_id")) == post:
        roles.add("question")
    return roles


def _describe(
    tracker: Tracker, graph: Graph, node: Node, manifest: Manifest, places: list[Place]
) -> dict[str, Any]:
    tables = {place.table for place in places if place.is_learnt_from}
    readers = _find_readers(tracker, graph, manifest, tables)
    reached = {(one.stage, one.key): one for one in readers}
    reached |= {(one.stage, one.key): one for one in graph.descendants(one.digest for one in readers)}
    learners = describe_learners(tracker, list(reached.values()))
    return {
        "data": {"key": node.key, "digest": node.digest},
        "is_searched": True,
        "places": [place._asdict() | {"is_learnt_from": place.is_learnt_from} for place in places],
        **learners,
    }


def _describe_unsearched(tracker: Tracker, graph: Graph, node: Node) -> dict[str, Any]:
    return {
        "data": {"key": node.key, "digest": node.digest},
        "is_searched": False,
        "places": [],
        **describe_learners(tracker, graph.descendants([node.digest])),
    }


def _find_readers(tracker: Tracker, graph: Graph, data: Manifest, tables: set[str]) -> list[Node]:
    """Return the artifacts whose stage has read one of these tables.

    A stage's manifest has the digest of the files that it reads. If that is of no set of this artifact's
    tables, but the stage took this artifact, it is assumed to have read all.
    """
    read = _tables_by_digest(data)
    readers = []
    for node in graph.nodes.values():
        if "data" not in node.inputs or node.stage == "report":
            continue
        manifest = find_manifest(tracker, node.stage, node.key)
        names = read.get(manifest["inputs"].get("data", "")) if manifest else None
        if names is None and node.inputs["data"] == data["digest"]:
            names = frozenset(tables)
        if names and names & tables:
            readers.append(node)
    return readers


def _tables_by_digest(data: Manifest) -> dict[str, frozenset[str]]:
    """Return the names of tables by the digest that a stage's manifest has if it reads just these."""
    files = {name: sha256 for name, sha256 in data["files"].items() if name.endswith(TABLE)}
    found = {}
    for count in range(1, len(files) + 1):
        for names in combinations(sorted(files), count):
            digest = digest_of({name: files[name] for name in names})
            found[digest] = frozenset(name.removesuffix(TABLE) for name in names)
    return found
