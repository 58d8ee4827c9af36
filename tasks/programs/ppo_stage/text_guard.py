"""Find out whether a batch's text has degenerated, by comparison with the SFT model's answers."""

from collections.abc import Sequence

from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.evaluation.text_statistics import (
    Baseline,
    TextStatistics,
    describe_answer,
    find_departures,
    mean_statistics,
)
from tasks.rlhf.training.rollouts import Rollout

LEAST_PROMPTS = 8  # of a batch whose text is compared: fewer say too little

NAMES = {
    "repeated_4grams": "repeated runs of four tokens",
    "distinct_2": "distinct pairs of tokens",
    "fenced": "characters in code fences",
    "zlib_ratio": "compressed size",
    "length": "length in tokens",
    "ended": "ended answers",
}


def describe_text_fault(baseline: Baseline, by_prompt: Sequence[TextStatistics], limit: float) -> str:
    """Return a phrase on the statistic that is furthest on its bad side, if it is by more than ``limit``
    standard errors and by a standard deviation of the prompts, "" if none is.
    """
    if len(by_prompt) < LEAST_PROMPTS:
        return ""
    batch = mean_statistics(by_prompt)
    found = find_departures(baseline, batch, len(by_prompt))
    far = [one for one in found if one.standard_errors > limit and one.deviations > 1]
    if not far:
        return ""
    worst = max(far, key=lambda one: one.standard_errors)
    now, usual = getattr(batch, worst.name), getattr(baseline.mean, worst.name)
    return (
        f"the answers have left the SFT model's range: {NAMES[worst.name]} {now:.3g} against "
        f"{usual:.3g}, {worst.standard_errors:.0f} standard errors away"
    )


def describe_rollout(rollout: Rollout, encoder: Encoder) -> list[TextStatistics]:
    """Return the statistics of each answer."""
    texts, ended = decode_answers(rollout, encoder), rollout.ended.tolist()
    return [
        describe_answer(ids, text, ended=is_ended)
        for ids, text, is_ended in zip(_answer_ids(rollout), texts, ended, strict=True)
    ]


def decode_answers(rollout: Rollout, encoder: Encoder) -> list[str]:
    """Return the texts of a rollout's answers."""
    tokenizer, template = encoder.tokenizer, encoder.template
    return [prompts.decode_answer(tokenizer, ids, template=template) for ids in _answer_ids(rollout)]


def _answer_ids(rollout: Rollout) -> list[list[int]]:
    ids, mask = rollout.batch
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
