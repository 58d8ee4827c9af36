"""Test what is said of data that cannot be searched for a post."""

import shutil
from pathlib import Path

import pytest

from flows.display.lineage_trees import post_tree, print_tree
from tasks.promotion import lineage, posts
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import make_run


@pytest.mark.parametrize("gone", ["*.parquet", "manifest.json"])
def test_data_whose_tables_are_gone_is_named_beside_the_data_that_has_the_post(
    tracker: Tracker, home: Path, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    lost, kept = make_run(tracker, 1), make_run(tracker, 2)
    key = lost.manifests["data"]["key"]
    for path in [path for path in home.rglob(gone) if key in str(path)]:
        path.unlink()
    if gone == "manifest.json":
        shutil.rmtree(home / "objects" / "data" / key)
    found = {one["data"]["key"]: one for one in posts.trace_post(tracker, lineage.load_graph(tracker), "10")}
    assert set(found) == {key, kept.manifests["data"]["key"]}
    one = found[key]
    assert (one["is_searched"], one["places"]) == (False, [])
    learnt = {artifact["stage"]: artifact["key"] for artifact in one["learnt"]}
    assert learnt == {
        stage: lost.manifests[stage]["key"] for stage in ("pretrain", "sft", "merge", "reward", "ppo")
    }
    assert found[kept.manifests["data"]["key"]]["is_searched"]
    print_tree(post_tree("10", list(found.values())))
    assert capsys.readouterr().out.count("its tables are gone, so it cannot be searched") == 1
