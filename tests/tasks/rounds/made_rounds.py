"""Put rounds whose pairs people label into MLflow, with a table of pairs that no model has answered."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.artifacts.store import Manifest, Recipe, Store, home
from tasks.rounds.label_round import LabelRound, find_round, open_round
from tasks.tracking import runs
from tasks.tracking.client import Tracker


def make_pairs(count: int, *, gold: int = 0) -> list[dict[str, Any]]:
    """Return pairs as the stage asked writes them; the last ``gold`` ones have a known answer."""
    return [
        {
            "pair_id": f"{number:032x}",
            "question_id": number,
            "prompt": f"How do I do thing {number}?",
            "messages": None,
            "first": f"Do it with tool {number}.",
            "second": f"Thing {number} cannot be done.",
            "first_policy": "secret policy",
            "second_policy": "sft",
            "disagreement": 0.25,
            "margin": 1.5,
            "chosen_by": "gold question" if number >= count - gold else "random",
            "known": "first" if number >= count - gold else "",
        }
        for number in range(count)
    ]


def make_artifact(
    tracker: Tracker,
    stage: str,
    seed: int,
    tables: dict[str, list[dict[str, Any]]],
    *,
    parent: str,
    origins: dict[str, str] | None = None,
) -> Manifest:
    """Store and upload an artifact with tables."""
    store = Store(home())
    recipe = Recipe(stage, {"seed": seed}, origins or {}, {}, origins or {})
    folder = store.partial(recipe.key) / "artifact"
    folder.mkdir(parents=True)
    summary = {"metrics": {}, "warnings": [f"{stage} {seed}"]}  # artifacts differ
    (folder / "summary.json").write_text(json.dumps(summary))
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    manifest = store.commit(recipe, seconds=1, peak_mb=1)
    with runs.stage_run(tracker, stage, recipe.key, recipe.job, parent=parent, inputs=origins) as run:
        run.upload_artifact(manifest, store.entry(stage, recipe.key))
    return manifest


def make_round(
    tracker: Tracker, pairs: list[dict[str, Any]], *, seed: int = 1, overlap: float = 0.0, least: int = 1
) -> LabelRound:
    """Make a run that waits for labels of the pairs; runs with equal pairs and seed are one round."""
    with runs.pipeline_run(tracker, f"rounds {seed}", {}, profile="rounds") as tracked:
        key = Recipe("asked", {"seed": seed}, {}, {}, {}).key
        if not Store(home()).lookup("asked", key):
            make_artifact(tracker, "asked", seed, {"asked": pairs}, parent=str(tracked.run_id))
        open_round(tracked, key, number=1, flow_run="", overlap=overlap, least=least)
    return find_round(tracker, str(tracked.run_id))
