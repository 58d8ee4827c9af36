"""Render the comparison of finished runs as one self-contained HTML page."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from tasks.reporting import charts, pages
from tasks.reporting.numbers import (
    MISSING,
    format_interval,
    format_number,
    format_percent,
    format_range,
)
from tasks.reporting.text import clip_text

TEMPLATE = "comparison_page.html.j2"
NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
JUDGES = {
    "gold": "gold scorer",
    "lm": "language model",
    "held_out": "held-out reward model",
    "reward": "reward model",
    "": MISSING,
}
NUM_SAMPLES = 12
LONGEST_TEXT = 1500  # characters of an answer that are shown
MOST_RANKS = 12  # columns of the table of ranks


def render(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the page as UTF-8; everything but Markup is escaped. ``results`` are those of results.json."""
    environment = pages.build_environment()
    environment.filters |= {
        "number": format_number,
        "percent": format_percent,
        "span": format_interval,
        "range": format_range,
        "clip": partial(clip_text, most=LONGEST_TEXT),
        "name": lambda policy: NAMES[policy],
        "judge": lambda judge: JUDGES[judge],
    }
    settings = list(dict.fromkeys(name for run in results["runs"] for name in run["settings"]))
    page = environment.get_template(TEMPLATE).render(
        style=pages.read_style(),
        title=_choose_title(results),
        settings=settings,
        bars=_draw_board(results),
        battles=[one | {"bar": _draw_battle(one)} for one in (results["judged"] or {}).get("battles", [])],
        first_battles=max(
            1, len((results["judged"] or {}).get("board", [])) - 1
        ),  # those of the first policy
        warnings=_collect_warnings(results["runs"]),
        samples=samples,
        most_ranks=MOST_RANKS,
        **results,
    )
    return page.encode()


def _collect_warnings(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return each warning once, after the letters of the runs that have raised it."""
    texts = dict.fromkeys(text for run in runs for text in run["warnings"])
    return [(", ".join(run["letter"] for run in runs if text in run["warnings"]), text) for text in texts]


def _choose_title(results: Mapping[str, Any]) -> str:
    """Return what the page is about: the first of the leaderboard, and whether it is shown to be better."""
    judged, rows = results["judged"], results["rows"]
    if judged and len(judged["board"]) > 1:
        first, second = (one["title"] for one in judged["board"][:2])
        if judged["battles"][0]["rate"]["low"] > 0.5:
            return f"{first} beats {second}"
        return f"{first} leads, and is not shown to be better than {second}"
    if judged and judged["board"]:
        return "The policies gave the same answers"
    if rows and rows[0]["rate"]:
        rate = format_percent(rows[0]["rate"]["value"])
        return f"{NAMES[rows[0]['policy']]} of {rows[0]['run']} wins most against its SFT model: {rate}"
    return f"{len(results['runs'])} runs"


def _draw_board(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a bar for each policy: its chance to win against the average policy, or against SFT."""
    if not results["judged"]:
        return [
            _bar(f"{NAMES[row['policy']]} of {row['run']}", row["policy"], row["rate"])
            for row in results["rows"]
            if row["rate"]
        ]
    bars = []
    for one in results["judged"]["board"]:
        strength = one["strength"]
        chances = {part: 1 / (1 + math.exp(-strength[part])) for part in ("value", "low", "high")}
        bars.append(_bar(one["title"], one["members"][0]["policy"], chances))
    return bars


def _bar(title: str, policy: str, rate: Mapping[str, Any]) -> dict[str, Any]:
    drawing = charts.draw_share_bar(
        [(f"p-{policy}", rate["value"])],
        value=rate["value"],
        low=rate["low"],
        high=rate["high"],
        title=f"{title}: {format_percent(rate['value'])} ({format_interval(rate)})",
    )
    return {"title": title, "policy": policy, "rate": rate, "bar": drawing}


def _draw_battle(battle: Mapping[str, Any]) -> Markup:
    tally, rate = battle["tally"], battle["rate"]
    total = sum(tally[name] for name in ("wins", "ties", "losses")) or 1
    parts = [("s0", tally["wins"] / total), ("tie", tally["ties"] / total), ("s1", tally["losses"] / total)]
    title = f"{battle['ours']} against {battle['theirs']}: {format_percent(rate['value'])}"
    return charts.draw_share_bar(parts, value=rate["value"], low=rate["low"], high=rate["high"], title=title)
