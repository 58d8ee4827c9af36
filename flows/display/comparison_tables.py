"""Print the comparison of finished runs on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.display.terminal import console
from tasks.config.policies import TITLES

JUDGES = {"gold": "gold scorer", "lm": "language model", "held_out": "held-out reward model", "": "none"}
JUDGES |= {"reward": "reward model"}
NONE = "-"
MOST_RANKS = 8  # columns
MOST_BATTLES = 12  # lines; the page has all


def print_comparison(results: Mapping[str, Any]) -> None:
    """Print what differs, each run's own figures, differences and, if a judge decided, the leaderboard."""
    screen = console()
    tables = [("What differs", _settings(results["runs"])), ("As each run measured itself", _rows(results))]
    if results["differences"]:
        tables.append(("Differences on the same questions", _differences(results["differences"])))
    judged = results["judged"]
    if judged:
        tables.append((f"Judged by {judged['judge']['title']} ({_worth(judged)})", _board(judged["board"])))
        tables.append(("Battles", _battles(judged["battles"])))
    for title, table in tables:
        screen.print(f"{title}", style="bold", markup=False, soft_wrap=True)
        screen.print(table)
        screen.print()
    for sentence in [*results["sentences"], *(judged["sentences"] if judged else [])]:
        screen.print(sentence, markup=False)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def _settings(runs: list[dict[str, Any]]) -> Table:
    table = _table("setting", *(run["letter"] for run in runs))
    table.add_row("run", *(Text(run["name"]) for run in runs))
    table.add_row("id", *(run["run_id"][:12] for run in runs))
    for name in dict.fromkeys(name for run in runs for name in run["settings"]):
        table.add_row(Text(name), *(Text(run["settings"][name][:60] or NONE) for run in runs))
    return table


def _rows(results: Mapping[str, Any]) -> Table:
    columns = (
        "win rate against SFT",
        "equal length",
        "KL",
        "perplexity",
        "worst attack",
        "judge (agreement)",
    )
    table = _table("policy", *columns, "warnings")
    for row in results["rows"]:
        judge = f"{JUDGES[row['judge']]} ({_share(row['agreement'], bounds=False)})"
        table.add_row(
            f"{TITLES[row['policy']]} of {row['run']}",
            _share(row["rate"]),
            _share(row["at_equal_length"], bounds=False),
            _number(row["kl"], bounds=False),
            _number(row["perplexity_tax"], bounds=False, unit=" %", sign="+"),
            _share(row["worst_attack"], bounds=False),
            judge if row["is_trusted"] else f"{judge}, doubted",
            str(row["warnings"]),
        )
    return table


def _differences(found: list[dict[str, Any]]) -> Table:
    table = _table("policy", "runs", "figure", "difference (95 %)", "unit", "n", "shown")
    for one in found:
        shown = "no" if one["verdict"] == "not shown" else one["verdict"]
        runs, n = f"{one['first']} less {one['second']}", f"{one['estimate']['n']:,}"
        difference = _number(one["estimate"], sign="+")
        table.add_row(TITLES[one["policy"]], runs, one["figure"], difference, one["unit"], n, shown)
    return table


def _board(board: list[dict[str, Any]]) -> Table:
    ranks = range(min(len(board), MOST_RANKS))
    table = _table("policy", "Elo", *(f"rank {rank + 1}" for rank in ranks))
    for one in board:
        shares = [f"{100 * one['ranks'][rank]:.0f} %" if one["ranks"][rank] else "" for rank in ranks]
        table.add_row(one["title"], f"{one['elo']:.0f}", *shares)
    return table


def _battles(battles: list[dict[str, Any]]) -> Table:
    table = _table("policy", "against", "wins", "equal length", "won", "tied", "lost")
    for one in battles[:MOST_BATTLES]:
        tally = [str(one["tally"][name]) for name in ("wins", "ties", "losses")]
        equal = _share(one["at_equal_length"], bounds=False)
        table.add_row(one["ours"], one["theirs"], _share(one["rate"]), equal, *tally)
    if len(battles) > MOST_BATTLES:
        table.add_row(f"... and {len(battles) - MOST_BATTLES} more (--html)")
    return table


def _worth(judged: Mapping[str, Any]) -> str:
    agreement = judged["judge"]["card"].get("agreement")
    if not agreement:
        return "without a report card"
    return f"agrees with {_share(agreement)} of held-out votes"


def _share(value: Mapping[str, Any] | None, *, bounds: bool = True) -> str:
    """Return a share in per cent: "64.1 % (61.0 to 67.2)"."""
    if not value or value.get("value") is None:
        return NONE
    interval = f" ({100 * value['low']:.1f} to {100 * value['high']:.1f})" if bounds else ""
    return f"{100 * value['value']:.1f} %{interval}"


def _number(value: Mapping[str, Any] | None, *, bounds: bool = True, unit: str = "", sign: str = "") -> str:
    if not value or value.get("value") is None:
        return NONE
    interval = f" ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})" if bounds else ""
    return f"{value['value']:{sign}.2f}{unit}{interval}"
