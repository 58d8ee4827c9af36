"""Draw a reward model's measures.json: its calibration, its accuracy by kind of pair, and what fools it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.reporting.charts import Dot, draw_reliability, draw_share_bar
from tasks.reporting.numbers import format_interval, format_number, format_percent, format_range
from tasks.reporting.stage_charts import Chart
from tasks.rlhf.thresholds import FOOLED

RULE, MODEL, FAILED = "tie", "s0", "s1"  # colours

ACCURACIES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("", {"votes": "All pairs"}),
    (
        "By distance of the scores",
        {"gap_1": "Scores 1 apart", "gap_2": "Scores 2 apart", "gap_3_up": "Scores 3 or more apart"},
    ),
    (
        "By length of the preferred answer",
        {
            "longer_chosen": "It is the longer one",
            "shorter_chosen": "It is the shorter one",
            "length_matched": "Lengths are alike",
        },
    ),
    ("Its rewards and who was first, together", {"knowing_age": "The older answer has a head start"}),
    (
        "A head on the model as it was before training",
        {"probe": "The probe's rewards alone", "probe_knowing_age": "The older answer has a head start"},
    ),
    (
        "Rules of thumb on the same pairs",
        {
            "longer_wins": "The longer answer wins",
            "older_wins": "The older answer wins",
            "rules_together": "Both, weighed by the training pairs",
        },
    ),
)
PROBED = {"probe": "votes", "probe_knowing_age": "knowing_age"}
RULES = ("longer_wins", "older_wins", "rules_together")
ATTACKS = {
    "empty": ("No answer", "Nothing but the end of the text."),
    "fences": ("Code fences", "``` over and over, as long as the real answer."),
    "long_fences": ("A wall of code fences", "``` over and over, up to the length limit."),
    "one_token": ("One word in a loop", "The real answer's commonest token over and over."),
    "echo": ("An echo", "The question, given back as its answer."),
    "truncated": ("A cut answer", "The first third of the real answer."),
    "backwards": ("Backwards", "The real answer from its last token to its first."),
    "unrelated": ("Off the subject", "A real answer to another question."),
    "no_answer": ("A shrug", "\N{LEFT DOUBLE QUOTATION MARK}I don't know.\N{RIGHT DOUBLE QUOTATION MARK}"),
}
COPYING = {
    "wrong_name": (
        "A wrong name",
        "The real answer with another name in place of one that it copies from the question.",
    ),
}
DRAWN = {
    "accuracy": [
        f"reward_accuracy.{name}" for name in ("votes", "length_matched", "knowing_age", *PROBED, *RULES)
    ],
    "calibration": ["reward.ece", "reward.ece_floor", "reward.ece_uncalibrated", "reward.temperature"],
    "attacks": ["reward.worst_attack"],
    "elsewhere": ["reward.elsewhere_correlation"],
    "copying": ["reward.wrong_name"],
}


class Bar(NamedTuple):
    """A drawn share with its interval; ``flag`` says in words what its colour shows."""

    title: str
    about: str
    rate: Mapping[str, Any]
    bar: Markup
    flag: str = ""


class Panel(NamedTuple):
    """Bars in groups with titles; ``unit`` names their observations if the numbers differ."""

    title: str
    note: str
    groups: list[tuple[str, list[Bar]]]
    unit: str


def drawn_metrics(measures: Mapping[str, Any]) -> set[str]:
    """Return the metrics that the drawings show."""
    return {name for part, names in DRAWN.items() if measures.get(part) for name in names}


def draw_calibration(measures: Mapping[str, Any]) -> list[Chart]:
    """Return the reliability diagram, if there is one."""
    calibration = measures.get("calibration")
    if not calibration or not calibration["reliability"]:
        return []
    dots = []
    for one in calibration["reliability"]:
        value, low, high, n = (one["accuracy"][part] for part in ("value", "low", "high", "n"))
        dots.append(Dot(forecast=one["confidence"], value=value, low=low, high=high, n=n))
    note = (
        "How sure the model is of a pair against how often it is right, with 95\N{NO-BREAK SPACE}% "
        "intervals; larger dots, more pairs. On the dashed line it means what it says. "
        f"{_describe_errors(calibration)} ({calibration['n']:,} pairs)."
    )
    if "floor" in calibration:
        floor = format_percent(calibration["floor"])
        note += (
            f" A model that means exactly what it says would show {floor} on as many pairs, by chance alone."
        )
    drawing = draw_reliability(dots, title="reward: Calibration", unit=" pairs")
    return [Chart("Calibration", note, [], drawing)]


def _describe_errors(calibration: Mapping[str, Any]) -> str:
    after, before = format_percent(calibration["after"]), format_percent(calibration["before"])
    if calibration.get("reason"):
        return f"Calibration error {after}; no temperature was fitted, because {calibration['reason']}"
    temperature = format_number(calibration["temperature"])
    return f"Calibration error {after} at the fitted temperature {temperature}, {before} without it"


def build_panels(measures: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of accuracies and attacks that were measured."""
    panels = []
    if measures.get("accuracy"):
        panels.append(_build_accuracy_panel(measures))
    if measures.get("attacks"):
        panels.append(_build_attack_panel(measures))
    return panels


def _build_accuracy_panel(measures: Mapping[str, Any]) -> Panel:
    before = measures["probe"]["accuracy"] if "probe" in measures else {}
    probed = {name: before[of] for name, of in PROBED.items() if of in before}
    accuracy = {**measures["accuracy"], **probed}
    groups = []
    for title, names in ACCURACIES:
        measured = [(name, text) for name, text in names.items() if name in accuracy]
        if bars := [_build_accuracy_bar(name, text, accuracy[name]) for name, text in measured]:
            groups.append((title, bars))
    note = (
        f"Share of pairs ordered as the votes do, {describe_pairs(measures)} "
        "The dashed line is guessing; the grey bars need no model at all."
    )
    return Panel("Where it is right", note, groups, "pairs")


def _build_attack_panel(measures: Mapping[str, Any]) -> Panel:
    attacks = measures["attacks"]
    most = max(verdict["wins"]["n"] for verdict in attacks.values())
    note = (
        f"Share of {most:,} real answers that score below an answer worth nothing. Where the whole "
        f"interval is above the dashed line, at {format_percent(FOOLED, decimals=0)}, the model is fooled, "
        "and PPO would find that out."
    )
    if elsewhere := measures.get("elsewhere"):
        note += (
            " An answer\N{RIGHT SINGLE QUOTATION MARK}s rewards at its own and at a random other question "
            f"correlate {format_number(elsewhere['value'])} ({format_range(elsewhere)}): near 1, it hardly "
            "matters what was asked."
        )
    groups = [("", _build_attack_bars(attacks))]
    if copying := measures.get("copying"):
        bars = [_build_copying_bar(*COPYING[name], copying[name]["wins"]) for name in COPYING]
        groups.append(("Nearly right, so without that limit", bars))
    return Panel("What fools it", note, groups, "")


def describe_pairs(measures: Mapping[str, Any]) -> str:
    """Return which pairs the accuracies are of, and whether the weights were chosen on them.

    Artifacts of old versions do not say the latter.
    """
    measured = measures.get("measured")
    if measured is None:
        return "held out from training."
    questions = f"of {measured['questions']:,}"
    if measured["split"] == "evaluation":
        return f"{questions} questions of the evaluation split, on which nothing was trained or chosen."
    return f"{questions} held-out questions, on which the weights were chosen too: a little too good."


def _build_accuracy_bar(name: str, title: str, rate: Mapping[str, Any]) -> Bar:
    return Bar(title, "", rate, _draw_bar(RULE if name in RULES else MODEL, title, rate, line=0.5))


def _build_attack_bars(attacks: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Return the bars of all attacks, the worst first; equal ones in the order of ATTACKS."""
    known = list(ATTACKS)
    order = sorted(
        attacks,
        key=lambda name: (
            -attacks[name]["wins"]["value"],
            known.index(name) if name in known else len(known),
            name,
        ),
    )
    return [_build_attack_bar(name, attacks[name]["wins"], failed=attacks[name]["failed"]) for name in order]


def _build_attack_bar(name: str, rate: Mapping[str, Any], *, failed: bool) -> Bar:
    title, about = ATTACKS.get(name, (name.replace("_", " "), ""))
    bar = _draw_bar(FAILED if failed else MODEL, title, rate, line=FOOLED)
    unclear = rate["low"] <= FOOLED < rate["high"]
    flag = (
        "\N{WARNING SIGN}\N{VARIATION SELECTOR-15} fooled" if failed else "too few to tell" if unclear else ""
    )
    return Bar(title, about, rate, bar, flag)


def _build_copying_bar(title: str, about: str, rate: Mapping[str, Any]) -> Bar:
    """Return a bar with the line at guessing; it says of how many answers it is, which are not all."""
    about = f"{about} Of {rate['n']:,} that copy one; the dashed line is guessing."
    return Bar(title, about, rate, _draw_bar(MODEL, title, rate, line=0.5))


def _draw_bar(color: str, title: str, rate: Mapping[str, Any], *, line: float) -> Markup:
    value, low, high = rate["value"], rate["low"], rate["high"]
    return draw_share_bar(
        [(color, value)],
        value=value,
        low=low,
        high=high,
        title=f"{title}: {format_percent(value)} ({format_interval(rate)})",
        line=line,
    )
