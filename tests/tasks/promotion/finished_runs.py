"""Put finished runs of the pipeline into MLflow, with artifacts that hold a few bytes each."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.artifacts.artifact import Artifact
from tasks.artifacts.store import Manifest, Recipe, Store, home
from tasks.config.pipeline import Pipeline
from tasks.promotion.opponents import find_opponents
from tasks.system.hashing import digest_of
from tasks.tracking import runs
from tasks.tracking.client import Tracker

SITE = "https://shell.example"
# what each stage takes; the tables of the data stage that it reads
INPUTS: dict[str, dict[str, str]] = {
    "site": {},
    "data": {"source": "site"},
    "pretrain": {"data": "data"},
    "sft": {"data": "data", "base": "pretrain"},
    "merge": {"base": "pretrain", "adapter": "sft"},
    "reward": {"data": "data", "model": "merge"},
    "ppo": {"data": "data", "model": "merge", "reward": "reward"},
    "dpo": {"data": "data", "model": "merge"},
    "answers": {"data": "data", "base": "pretrain", "model": "merge"},
    "winrate": {"data": "data", "model": "merge", "reward": "reward", "answers": "answers"},
    "report": {},
}
TABLES = {
    "pretrain": ("corpus",),
    "sft": ("finetune",),
    "reward": ("reward", "evaluation_pairs"),
    "ppo": ("rl",),
    "dpo": ("reward", "evaluation_pairs"),
    "answers": ("evaluation",),
    "winrate": ("evaluation", "evaluation_pairs"),
}
MORE = ("report",)  # stages of the runs whose artifacts a test writes itself
Write = Callable[[str, Path], dict[str, Any]]
# question, answers: one question in each split; 50 is in the evaluation split alone
POSTS = {"finetune": (10, [11, 12]), "reward": (20, [21, 22]), "rl": (30, []), "evaluation": (50, [51, 52])}


def interval(value: float, low: float, high: float, n: int = 500) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


GOOD: dict[str, Any] = {
    "gold_win_rate.ppo_vs_sft": interval(0.785, 0.761, 0.809),
    "gold_win_rate.ppo_vs_base": interval(0.937, 0.921, 0.953),
    "gold_win_rate.ppo_vs_champion": interval(0.58, 0.53, 0.63),
    "judge.gold.agreement": interval(0.945, 0.937, 0.953, 323),
    "judge.gold.longer_wins": interval(0.572, 0.545, 0.6, 323),
    "reward.worst_attack": interval(0.1, 0.08, 0.13, 512),
    "tax.arc.ppo_vs_sft": interval(0.4, -0.6, 1.4),
    "ppo.kl": interval(1.5, 1.4, 1.6),
}


class MadeRun(NamedTuple):
    """A finished run."""

    run_id: str
    name: str
    manifests: dict[str, Manifest]


def make_run(
    tracker: Tracker,
    seed: int,
    metrics: Mapping[str, Any] = GOOD,
    *,
    policies: tuple[str, ...] = ("ppo",),
    settings: dict[str, Any] | None = None,
    profile: str = "demo",
    write: Write | None = None,
    parent: str | None = None,
) -> MadeRun:
    """Build, upload and summarise a run, compared with the champion; another seed leads to other keys.

    ``write`` writes more files of a stage's artifact into its folder and returns settings of its job; with
    ``parent``, the run of a flow of rounds, it is the round whose number is the seed.
    """
    name, manifests = f"{profile} {seed}", dict[str, Manifest]()
    pipeline = Pipeline.model_validate({"seed": seed, **(settings or {})})
    promotion, config = pipeline.promotion, pipeline.model_dump(mode="json")
    opened = runs.pipeline_run(
        tracker, name, config, flow_run_id=f"flow-{seed}", profile=profile, parent=parent
    )
    with opened as tracked:
        for stage in INPUTS:
            if (stage not in ("ppo", "dpo") or stage in policies) and (write or stage not in MORE):
                found = find_opponents(tracker, promotion, profile) if stage == "answers" else {}
                manifests[stage] = _build(tracker, stage, seed, manifests, str(tracked.run_id), write, found)
        stages = [
            {"name": stage, "key": made["key"], "digest": made["digest"], "warnings": [], "metrics": {}}
            for stage, made in manifests.items()
        ]
        summary = {"profile": profile, "stages": stages, "metrics": dict(metrics), "finished": time.time()}
        folder = home() / "runs" / f"flow-{seed}"
        folder.mkdir(parents=True)
        for file, content in {"summary.json": summary, "config.json": config}.items():
            (folder / file).write_text(json.dumps(content))
            tracked.upload(folder / file)
        assert tracked.run_id
        return MadeRun(tracked.run_id, name, manifests)


def _build(
    tracker: Tracker,
    stage: str,
    seed: int,
    made: dict[str, Manifest],
    parent: str,
    write: Write | None,
    opponents: Mapping[str, Artifact],
) -> Manifest:
    origins = {name: made[taken]["digest"] for name, taken in INPUTS[stage].items()}
    contents = {name: _content(stage, name, made) for name in origins}
    if opponents:
        origins["champion"] = contents["champion"] = opponents["champion"]["digest"]
    store = Store(home())
    folder = store.partial(f"{stage}-{seed}") / "artifact"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"metrics": {}, "warnings": []}')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text(f"{stage} {seed}")
    if stage == "merge" and not write:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_text(f"{stage} {seed}")
    if stage == "data":
        _write_tables(folder, seed)
    job = {"seed": seed} | (write(stage, folder) if write else {})
    recipe = Recipe(stage, job, contents, {}, origins)
    store.partial(f"{stage}-{seed}").rename(store.partial(recipe.key))
    manifest = store.commit(recipe, seconds=1, peak_mb=1)
    with runs.stage_run(tracker, stage, recipe.key, recipe.job, parent=parent, inputs=origins) as run:
        run.upload_artifact(manifest, store.entry(stage, recipe.key))
    return manifest


def _content(stage: str, name: str, made: dict[str, Manifest]) -> str:
    files = made[INPUTS[stage][name]]["files"]
    tables = {f"{table}.parquet" for table in TABLES.get(stage, ())}
    return digest_of({file: sha for file, sha in files.items() if name != "data" or file in tables})


def _write_tables(folder: Path, seed: int) -> None:
    """Write tables as the data stage does, as far as ids, links and sites go."""
    (folder / "card.json").write_text(json.dumps({"licences": {"CC BY-SA 4.0": 9}, "seed": seed}))
    for split, (question, answers) in POSTS.items():
        about = {
            "question_id": question,
            "prompt": f"{split} {seed}",
            "site": "shell.example",
            "question_url": f"{SITE}/q/{question}",
        }
        links = [f"{SITE}/a/{answer}" for answer in answers]
        pair = dict(zip(("chosen_url", "rejected_url"), links, strict=False))
        tables: dict[str, list[dict[str, Any]]] = {
            "finetune": {
                "finetune": [about | {"answer_url": links[0]}] if links else [],
                "corpus": [about | {"answer_url": link} for link in links],
            },
            "reward": {"reward": [about | pair], "reward_groups": [about | {"answer_url": links}]},
            "rl": {"rl": [about]},
            "evaluation": {"evaluation": [about | {"answer_url": links}], "evaluation_pairs": [about | pair]},
        }[split]
        for table, rows in tables.items():
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{table}.parquet")
