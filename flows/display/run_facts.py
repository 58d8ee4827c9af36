"""Say which run a report or a model card is about: what is in no key, so not in the artifact either."""

import html
import json
import time
from pathlib import Path
from typing import Any

from tasks.artifacts.store import flatten
from tasks.config.pipeline import Pipeline
from tasks.tracking.run_origin import COMMIT, MODIFIED, origin_tags

TRAINING = ("seed", "base", "text", "weights", "sft", "merge")  # settings that every policy depends on
OF_POLICY = {"ppo": ("reward", "ppo"), "dpo": ("dpo",)}


def collect_facts(config: Pipeline, *, profile: str, run_name: str, run_id: str) -> dict[str, str]:
    """Return what a page's head says about its run."""
    source, base = config.source.model_dump(mode="json"), config.base.model_dump(mode="json")
    return {
        "profile": profile,
        "base": _name_place(base),
        "data": _name_place(source),
        "method": {"both": f"{config.ppo.title} and DPO", "ppo": config.ppo.title}.get(config.method, "DPO"),
        "seed": str(config.seed),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _name_commit(),
        "run": run_name or run_id,
    }


def _name_place(section: dict[str, Any]) -> str:
    """Return the kind of a base or source and its hub id, or its folder's or file's name without the path."""
    path = str(section.get("path") or "")
    return " ".join(filter(None, [section["kind"], find_hub_id(path) or Path(path).name]))


def find_hub_id(path: str) -> str:
    """Return a path that is an id on the Hugging Face hub; "" for a file or folder."""
    is_id = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    return path if is_id else ""


def _name_commit() -> str:
    tags = origin_tags("")
    if COMMIT not in tags:
        return "none: installed as a package"
    return tags[COMMIT][:12] + (", with changes" if tags[MODIFIED] == "true" else "")


def facts_as_html(facts: dict[str, str]) -> str:
    """Return the entries of a description list."""
    pairs = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return "".join(pairs)


def facts_as_markdown(facts: dict[str, Any]) -> str:
    """Return a table in Markdown; values are code, in which no character is markup."""
    rows = [f"| {name} | {_as_code(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _as_code(value: Any) -> str:
    """Return any value as inline code in a table: no backtick ends it, and no bar its cell."""
    shown = value if isinstance(value, str) else json.dumps(value)
    text = "".join(letter if letter.isprintable() else " " for letter in shown)
    flat = " ".join(text.replace("`", "'").replace("|", "\N{BROKEN BAR}").split())
    return f"`{flat}`" if flat else ""


def training_settings(config: Pipeline, policy: str) -> dict[str, Any]:
    """Return the settings that a policy's training depends on, by dotted names, without paths."""
    settings = config.model_dump(mode="json", include={*TRAINING, *OF_POLICY[policy]})
    found = flatten(settings)
    return {name: value for name, value in found.items() if not name.endswith((".path", ".start"))}
