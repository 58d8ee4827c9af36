"""Name metrics for MLflow's pages, which group them by the path before the last "/".

Everywhere else (summary.json, gates, the report, metrics.jsonl) a metric keeps its own name. Curves lie in
train/, results in eval/, the tables' sizes in data/, time and memory in system/, and the ends of intervals in
intervals/, so that they do not crowd the charts. The map takes any name, and no two names meet in one:
docs/metrics.md has it as a table.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME = 250  # characters; MLflow's limit
ALLOWED = re.compile(r"[\w -]")
INTERVALS = "intervals"
INTERVAL_FIELDS = ("low", "high", "n")
TRAINING_STAGES = ("pretrain", "sft", "reward", "reference", "ppo", "dpo")
DATA_STAGES = ("site", "data")
WORD = r"([^.]+)"  # one part of a dotted name
REST = r"(.+)"  # one part or several

# the first pattern that matches the whole name counts; MLflow's name has "/" for each "."
FINAL = [
    (re.compile(pattern), group)
    for pattern, group in (
        (rf"{WORD}_win_rate\.{REST}", r"eval.win_rate.\1.\2"),
        (rf"{WORD}_win_rate_(at_equal_length|corrected)\.{REST}", r"eval.win_rate_\2.\1.\3"),
        (rf"{WORD}_score\.{REST}", r"eval.score.\1.\2"),
        (rf"{WORD}\.(flipped|unparseable)", r"eval.verdicts.\1.\2"),
        (rf"{WORD}\.(kl|length|ended)", r"eval.\2.\1"),
        (rf"{WORD}\.([a-z]+_cut|pairs_equal_once_cut)", r"data.cut.\1.\2"),
        (rf"(judge|perplexity|bits_per_byte|tax|benchmark|mcnemar|reward_bench)\.{REST}", r"eval.\1.\2"),
        (rf"reward_accuracy\.{REST}", r"eval.reward_accuracy.\1"),
        (rf"reward\.{REST}", r"eval.reward_model.\1"),
        (rf"(pretrain|sft|merge|reference|ppo|dpo|answers|winrate|benchmarks|report)\.{REST}", r"eval.\1.\2"),
        (rf"(candidates|asked|comparisons|mixture)\.{REST}", r"eval.rounds.\1.\2"),
        (rf"data\.{WORD}", r"data.\1"),
        (rf"site\.{WORD}", r"data.site.\1"),
        (r"(seconds|peak_mb)", r"system.\1"),
        (REST, r"other.\1"),
    )
]


def final_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return a stage's or run's final figures by their names in MLflow; what is no number is left out.

    The ends of an interval, {value, low, high, n}, get names of their own.
    """
    return {name: float(value) for name, value in _figures(metrics, "") if isinstance(value, int | float)}


def _figures(metrics: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for child, value in metrics.items():
        name = f"{above}{child}"
        if not isinstance(value, Mapping):
            yield final_name(name), value
        elif "value" in value:
            yield final_name(name), value["value"]
            yield from ((interval_name(name, end), value.get(end)) for end in INTERVAL_FIELDS)
        else:
            yield from _figures(value, f"{name}.")


def interval_name(name: str, field: str) -> str:
    """Return the name in MLflow of an end of a figure's interval, or of its sample size."""
    return _limit(f"{INTERVALS}/{_place(name)}.{field}")


def final_name(name: str) -> str:
    """Return the name that a final figure has in MLflow."""
    return _limit(_place(name))


def curve_name(stage: str, name: str) -> str:
    """Return the name that a value per step has in MLflow, of a line of the stage's metrics.jsonl."""
    if stage in TRAINING_STAGES:
        group = "train"
    else:
        group = "data/progress" if stage in DATA_STAGES else "eval/progress"
    parts = (_escape_part(part) for part in name.split("."))
    return _limit("/".join([group, _escape_part(stage), *parts]))


def _place(name: str) -> str:
    escaped = ".".join(_escape_part(part) for part in name.split("."))
    for pattern, group in FINAL:
        if match := pattern.fullmatch(escaped):
            return match.expand(group).replace(".", "/")
    raise AssertionError(name)


def _escape_part(part: str) -> str:
    """Return a part of a name with each character that MLflow refuses as a colon, its code and a colon.

    An empty part becomes a colon.
    """
    letters = (letter if ALLOWED.match(letter) else f":{ord(letter):X}:" for letter in part)
    return "".join(letters) or ":"


def _limit(name: str) -> str:
    """Return a name of at most MAX_NAME characters; a longer one ends with its digest."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{name[:200]}:{digest}"
