"""Build card.json and the metrics of the data stage."""

from collections.abc import Mapping

import numpy as np

from tasks.dataset.card import Card
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.curation.split_assignment import SplitAssignment
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.statistics import Statistics
from tasks.programs.data_stage import read_source, source_warnings
from tasks.programs.data_stage.data_run import DataRun

UNPAIRED = "questions of the reward split without two differently scored answers"


def build_card(
    data_run: DataRun,
    statistics: Statistics,
    quarantine: Quarantine,
    assignment: SplitAssignment,
    rows: Mapping[str, int],
) -> Card:
    """Return card.json; ``rows`` is the number of rows of each table."""
    job, counts = data_run.job, data_run.counts
    split_sizes = np.bincount(assignment.splits, minlength=len(SPLITS)).tolist()
    is_reward = assignment.splits == SPLITS.index("reward")
    counts.dropped[UNPAIRED] += int((is_reward & ~assignment.comparable).sum())
    other_files = read_source.other_files(job.source, data_run.source)
    return {
        **statistics.to_card(),
        "kind": job.source.kind,
        "rules": job.data.model_dump(mode="json", exclude={"decontaminate_against"}),
        "read": dict(sorted(counts.read.items())),
        "dropped": {reason: count for reason, count in sorted(counts.dropped.items()) if count},
        "masked": dict(sorted(counts.masked.items())),
        "quarantined": dict(sorted(quarantine.reasons.items())),
        "rows_seen": quarantine.rows,
        **source_warnings.card_columns(counts.warnings, counts.tests, rows=quarantine.rows),
        "other_files": other_files[: source_warnings.MOST_NAMES],
        "split_questions": dict(zip(SPLITS[1:], split_sizes[1:], strict=True)),
        "rows": dict(rows),
    }


def build_metrics(card: Card) -> dict[str, float]:
    """Return the metrics of the stage's summary."""
    kept, rows = card["kept"], card["rows"]
    metrics = {
        "data.questions": kept["questions"],
        "data.answers": kept["answers"],
        "data.pairs": kept["pairs"],
        "data.dropped": sum(card["dropped"].values()),
        "data.quarantined": sum(card["quarantined"].values()),
        "data.longer_wins": card["longer_wins"],
        "data.finetune_rows": rows["finetune"],
        "data.reward_pairs": rows["reward"],
        "data.rl_prompts": rows["rl"],
        "data.evaluation_questions": rows["evaluation"],
    }
    if card["older_wins"] is not None:
        metrics["data.older_wins"] = card["older_wins"]
    return metrics
