"""Refuse data from which a split would come out empty."""

import numpy as np
from numpy.typing import NDArray

from tasks.config.sections.data import Data
from tasks.dataset.curation.question_files import SPLITS
from tasks.dataset.curation.split_assignment import SplitAssignment
from tasks.programs.data_stage.data_run import DataRun
from tasks.system.errors import InputError


def check_splits(assignment: SplitAssignment, data_run: DataRun) -> None:
    """Raise InputError if there is nothing to compare, or if a split that is needed has no questions."""
    kept = assignment.splits > 0
    if not (assignment.comparable & kept).any():
        raise _nothing_to_compare(data_run, int(kept.sum()))
    for number, name in enumerate(SPLITS[1:], 1):
        is_used = assignment.splits == number
        if name == "reward":
            is_used &= assignment.comparable
        if not is_used.any() and _is_needed(name, data_run.job.data):
            raise _empty_split(name, kept)


def _is_needed(split: str, data: Data) -> bool:
    return split != "rl" or bool(data.rl_share)  # DPO needs no prompts of its own


def _nothing_to_compare(data_run: DataRun, num_kept: int) -> InputError:
    counts = sorted(data_run.counts.read.items(), reverse=True)
    read = " and ".join(f"{count} {what}" for what, count in counts) or "nothing"
    return InputError(
        f"{data_run.source} has no question with two differently scored answers "
        f"(found {read}; {num_kept} questions with a usable answer): "
        "give a dump with bodies and votes, or rows with comparisons."
    )


def _empty_split(name: str, kept: NDArray[np.bool_]) -> InputError:
    what = "questions with differently scored answers" if name == "reward" else "questions"
    remedy = f"raise data.{name}_share"
    if name == "evaluation":
        remedy = "lower data.finetune_share, data.reward_share or data.rl_share"
    return InputError(
        f"The {name} split has no {what} (of {int(kept.sum())} usable questions in all): {remedy}, "
        "or give a dump with more questions."
    )
