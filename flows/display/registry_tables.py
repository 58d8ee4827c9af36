"""Print registered models and the evidence for a promotion on the terminal."""

import time

from rich.table import Table
from rich.text import Text

from flows.display.terminal import console
from tasks.promotion.promotion import VERDICTS, Proposal
from tasks.tracking.registry import DECIDED_BY, DECISION, ModelVersion


def print_evidence(proposal: Proposal) -> None:
    """Print what each gate says about a proposal."""
    screen = console()
    screen.print(proposal.title, style="bold", markup=False)
    table = Table("gate", "verdict", "figure", "threshold", box=None, pad_edge=False, header_style="bold")
    for one in proposal.results:
        table.add_row(*(Text(cell) for cell in (one.name, VERDICTS[one.passed], one.figure, one.threshold)))
    screen.print(table)
    if proposal.off:
        screen.print(f"Gates that are off: {', '.join(proposal.off)}", markup=False)
    screen.print()


def print_versions(versions: list[ModelVersion]) -> None:
    """Print a line for each version of the registered models."""
    columns = ("model", "version", "alias", "policy", "win rate against SFT", "decision", "run", "date")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for one in versions:
        by = one.tags.get(DECIDED_BY, "")
        decision = one.tags.get(DECISION, "") + (f" by {by}" if by else "")
        cells = (
            one.name,
            one.version,
            ", ".join(one.aliases),
            one.tags.get("policy", ""),
            one.tags.get("win_rate_vs_sft", ""),
            decision,
            one.tags.get("run", one.run_id)[:12],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.created)),
        )
        table.add_row(*map(Text, cells))
    console().print(table)
