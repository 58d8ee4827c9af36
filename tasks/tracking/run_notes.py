"""Describe a run in Markdown and tags, for its page in MLflow."""

import re
import socket
from typing import Any

from tasks.artifacts.store import home
from tasks.tracking.metric_names import final_metrics

STAGES = {
    "site": "Generates the built-in site: questions, answers and votes.",
    "data": "Reads the source, pairs answers by their votes, and splits the questions.",
    "pretrain": "Trains the built-in base from scratch.",
    "sft": "Fine-tunes the base model on the best answer to each question.",
    "merge": "Merges the fine-tuned weights into the base: the SFT model, which all policies start from.",
    "reward": "Trains the reward model on pairs of answers.",
    "candidates": "Samples answers of the last policies, whose pairs may be compared in this round.",
    "asked": "Chooses the pairs that are compared in this round.",
    "comparisons": "Gets verdicts on the pairs that are asked about, and makes comparisons of them.",
    "mixture": "Mixes votes and the comparisons of all rounds, for the reward model.",
    "ppo": "Trains a policy with PPO against the reward model.",
    "reference": "Computes the SFT model's log-probabilities of the compared answers, for DPO.",
    "dpo": "Trains a policy with DPO on the pairs of the reward model.",
    "answers": "Samples an answer of each model to each held-out question.",
    "winrate": "Grades the judges on held-out votes, and lets them compare the models' answers.",
    "benchmarks": "Measures what alignment costs: perplexity of held-out answers, and benchmarks.",
    "compare": "Compares finished runs by the answers that they have stored.",
    "report": "Draws the report and the model card.",
    "given": "Keeps a file of the user's for other machines.",
}
MAX_FIGURES = 12  # of a stage's description


def pipeline_facts(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a pipeline trains on, with which method and where, by titles."""
    source, base = (settings.get(part) or {} for part in ("source", "base"))
    facts = {
        "Profile": name,
        "Method": settings.get("method"),
        "Source": source.get("path") or source.get("kind"),
        "Base": base.get("path") or base.get("kind"),
        "Seed": settings.get("seed"),
        "Machine and home": machine_and_home(),
    }
    return {fact: value for fact, value in facts.items() if value not in (None, "")}


def pipeline_tags(settings: dict[str, Any], commit: str) -> dict[str, str]:
    """Return the tags that runs are told apart by in MLflow's table of them."""
    facts = {**pipeline_facts("", settings), **({"Commit": commit[:12]} if commit else {})}
    named = ("Method", "Source", "Base", "Seed", "Commit")
    return {name.lower(): str(facts[name]) for name in named if name in facts}


def describe_pipeline(name: str, settings: dict[str, Any]) -> str:
    """Return the description of a pipeline's run that has no results yet."""
    return quote_facts(pipeline_facts(name, settings))


def describe_stage(stage: str, key: str, inputs: dict[str, str], found: str = "") -> str:
    """Return the description of a stage's run; ``inputs`` are digests by name, ``found`` its figures."""
    taken = ", ".join(f"{name} {digest[:12]}" for name, digest in inputs.items()) or "nothing"
    facts = {"Stage": stage, "Key": key[:12], "Takes": taken, "Machine and home": machine_and_home()}
    return "\n\n".join(filter(None, [STAGES.get(stage), found, quote_facts(facts)]))


def describe_figures(metrics: dict[str, Any], warnings: list[str]) -> str:
    """Return what a stage has found: its warnings and first figures, under their names in MLflow."""
    found = ((name, value) for name, value in final_metrics(metrics).items() if name.startswith("eval/"))
    figures = dict(sorted(found, key=lambda one: not one[0].startswith("eval/win_rate/")))
    told = [f"- **{escape(text)}**" for text in warnings]
    rows = [f"| {name} | {value:.4g} |" for name, value in list(figures.items())[:MAX_FIGURES]]
    table = ["| figure | value |", "|---|---|", *rows] if rows else []
    if len(figures) > MAX_FIGURES:
        table += ["", f"and {len(figures) - MAX_FIGURES} more, below"]
    return "\n".join([*told, "", *table]).strip()


def machine_and_home() -> str:
    """Return the host name and the home of this process, which together say whose runs are whose."""
    return f"{socket.gethostname()}:{home()}"


def quote_facts(facts: dict[str, Any]) -> str:
    """Return facts as a list in Markdown."""
    return "\n".join(f"- {fact}: {_quote(value)}" for fact, value in facts.items())


def escape(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~-])", r"\\\1", flat)


def _quote(value: Any) -> str:
    """Return any value as inline code, so that no character of it is read as Markdown."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value)).replace("`", "'")
    return f"`{text[:200]}`"
