"""Draw what `alignflow lineage` has found as trees on the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from flows.display.terminal import console

SHORT = 12  # characters of keys and digests


def print_tree(tree: Tree) -> None:
    """Print a tree; long lines stay whole when the output is not a terminal."""
    console().print(tree, soft_wrap=not console().is_terminal)


def version_tree(found: dict[str, Any]) -> Tree:
    """Return the tree of `lineage.trace_version`: a model version above what it was made from."""
    aliases = f" ({', '.join(found['aliases'])})" if found["aliases"] else ""
    tree = Tree(Text(f"{found['model']} version {found['version']}{aliases}", style="bold"))
    licence = f", licence of the texts: {found['licence']}" if found["licence"] else ""
    tree.add(Text(f"run {found['run']}{licence}"))
    _add_artifact(tree, "policy", found["policy"])
    return tree


def _add_artifact(tree: Tree, role: str, found: dict[str, Any]) -> None:
    if found["stage"] == "given":
        tree.add(Text(f"{role}: brought by the user, digest {found['digest']}"))
        return
    name = found["stage"] if role == found["stage"] else f"{role}: {found['stage']}"
    facts = [f"{name} {found['key'][:SHORT]}"]
    if digest := found.get("digest"):
        facts.append(f"digest {digest[:SHORT]}")
    if found.get("repeated"):
        tree.add(Text(", ".join([*facts, "see above"])))
        return
    facts += [f"{fact} {found[fact][:SHORT]}" for fact in ("seed", "commit") if found.get(fact)]
    branch = tree.add(Text(", ".join(facts)))
    for name, taken in found.get("inputs", {}).items():
        _add_artifact(branch, name, taken)


def learners_tree(found: dict[str, Any]) -> Tree:
    """Return the tree of `lineage.find_learners`: digests above what was built from them."""
    tree = Tree(Text(f"digest {', '.join(digest[:SHORT] for digest in found['digests'])}", style="bold"))
    _add_learners(tree, found)
    return tree


def post_tree(post: str, found: list[dict[str, Any]]) -> Tree:
    """Return the tree of `posts.trace_post`: a post above the splits that have it and what learnt from it."""
    tree = Tree(Text(f"post {post}", style="bold"))
    if not found:
        tree.add(Text("in no data that this machine or MLflow has"))
    for one in found:
        branch = tree.add(Text(f"data {one['data']['key'][:SHORT]}, digest {one['data']['digest'][:SHORT]}"))
        if not one["is_searched"]:
            branch.add(Text("its tables are gone, so it cannot be searched; it may have the post"))
        for place in one["places"]:
            use = "learnt from" if place["is_learnt_from"] else "for evaluation only"
            rows = "1 row" if place["rows"] == 1 else f"{place['rows']:,} rows"
            where = ", ".join([rows, f"as {' and '.join(place['roles'])}", *filter(None, place["sites"])])
            branch.add(Text(f"{place['table']}: {use} ({where})"))
        _add_learners(branch, one)
    return tree


def label_tree(labels: Sequence[str], found: list[dict[str, Any]]) -> Tree:
    """Return the tree of `label_lineage.trace_labels`: labels above what was made of them."""
    more = f" and {len(labels) - 1:,} more" if len(labels) > 1 else ""
    tree = Tree(Text(f"label {labels[0][:SHORT]}{more}", style="bold"))
    if not found:
        tree.add(Text("in no comparisons that this machine or MLflow has"))
    for one in found:
        made = one["comparisons"]
        branch = tree.add(Text(f"comparisons {made['key'][:SHORT]}, digest {made['digest'][:SHORT]}"))
        if not one["is_searched"]:
            branch.add(Text("their labels are gone, so they cannot be searched; they may have it"))
        _add_learners(branch, one)
    return tree


def _add_learners(tree: Tree, found: dict[str, Any]) -> None:
    names = [
        f"{one['model']} version {one['version']}"
        + (f" ({', '.join(one['aliases'])})" if one["aliases"] else "")
        for one in found["versions"]
    ]
    _add_list(tree, "model versions that have learnt from it", names)
    _add_list(tree, "artifacts that have learnt from it", map(_artifact, found["learnt"]))
    _add_list(tree, "other artifacts that were made from it", map(_artifact, found["derived"]))


def _artifact(found: dict[str, str]) -> str:
    return f"{found['stage']} {found['key'][:SHORT]}"


def _add_list(tree: Tree, title: str, names: Iterable[str]) -> None:
    listed = list(names)
    branch = tree.add(Text(f"{title}: {len(listed) or 'none'}"))
    for name in listed:
        branch.add(Text(name))
