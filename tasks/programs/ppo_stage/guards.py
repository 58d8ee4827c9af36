"""Watch PPO's answers: text that degenerates, and a KL above its budget; warn, hold the policy, or stop.

The first batch of answers is the SFT model's own, because the policy starts as it. Later batches are compared
with it (tasks/rlhf/evaluation/text_statistics.py). An alarm needs two batches in a row.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.config.sections.ppo import Ppo
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.evaluation.text_statistics import (
    Baseline,
    TextStatistics,
    describe_answer,
    mean_statistics,
    measure_baseline,
    standard_errors,
)
from tasks.rlhf.training.rollouts import PpoModels, Rollout

IN_A_ROW = 2  # batches
RAISE = 1.5  # factor of the KL penalty's weight at each alarm

NAMES = {
    "repeated_4grams": "repeated runs of four tokens",
    "distinct_2": "distinct pairs of tokens",
    "fenced": "characters in code fences",
    "zlib_ratio": "compressed size",
    "length": "length in tokens",
    "ended": "ended answers",
}


class Alarm(NamedTuple):
    """What was seen, and what was done about it."""

    step: int
    reason: str
    action: str


class Guards:
    """Checks each batch of answers before the policy learns from it.

    ``good`` holds the policy's weights that sampled the last batch without a fault: a stop returns to them.
    """

    def __init__(self, settings: Ppo, models: PpoModels, state: dict[str, Any], good: dict[str, Tensor]):
        self.settings, self.models, self.good = settings, models, good
        known = state.get("guards", {})
        self.baseline = Baseline(*(TextStatistics(*one) for one in known["baseline"])) if known else None
        self.faults: int = known.get("faults", 0)
        self.alarms = [Alarm(*one) for one in known.get("alarms", [])]

    def check(self, step: int, rows: list[TextStatistics], kl: float) -> Alarm | None:
        """Return the alarm of this batch, if there is one; ``kl`` is in nats an answer."""
        if self.baseline is None:
            self.baseline = measure_baseline(rows)
        reason = self._find_fault(rows, kl)
        if not reason:
            self.faults = 0
            self.good = {name: one.detach().clone() for name, one in self.models.policy.items()}
            return None
        self.faults += 1
        if self.faults < IN_A_ROW:
            return None
        alarm = Alarm(step, reason, self.settings.on_alarm)
        self.alarms.append(alarm)
        return alarm

    @property
    def kl_factor(self) -> float:
        """Return what the weight of the KL penalty is multiplied by at an alarm."""
        return RAISE if self.settings.on_alarm == "raise_kl" else 1.0

    def _find_fault(self, rows: list[TextStatistics], kl: float) -> str:
        """Return a phrase about what is wrong with a batch, "" if nothing is."""
        assert self.baseline is not None
        budget, limit = self.settings.kl_budget, self.settings.text_alarm
        if budget is not None and kl > budget:
            return f"the KL from the SFT model was {kl:.1f} nats an answer, above ppo.kl_budget={budget:g}"
        if limit is None:
            return ""
        batch = mean_statistics(rows)
        errors = standard_errors(self.baseline, batch, len(rows))._asdict()
        name = max(errors, key=lambda one: errors[one])
        if errors[name] <= limit:
            return ""
        now, usual = getattr(batch, name), getattr(self.baseline.mean, name)
        return (
            f"the answers have left the SFT model's range: {NAMES[name]} {now:.3g} against {usual:.3g}, "
            f"{errors[name]:.0f} standard errors away"
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Give the policy the weights that sampled the last batch without a fault."""
        for name, parameter in self.models.policy.items():
            parameter.copy_(self.good[name])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, beside ``good``."""
        return {"guards": {"baseline": self.baseline, "faults": self.faults, "alarms": self.alarms}}

    def warnings(self) -> list[str]:
        """Return a sentence on the first alarm, if there was one."""
        if not self.alarms:
            return []
        first, others = self.alarms[0], len(self.alarms) - 1
        done = {
            "warn": "Training went on: ppo.on_alarm=stop ends it with the weights before",
            "raise_kl": "The weight of the KL penalty was raised",
            "stop": "Training ended with the weights before; a lower ppo.learning_rate or a higher "
            "ppo.kl_coefficient goes further",
        }[first.action]
        more = f" So it was in {others} more steps." if others else ""
        return [f"In step {first.step} {first.reason}. {done}.{more}"]


def describe_rollout(rollout: Rollout, encoder: Encoder) -> list[TextStatistics]:
    """Return the statistics of each answer."""
    tokenizer, template = encoder.tokenizer, encoder.template
    ids, mask = rollout.batch
    answers = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return [
        describe_answer(one, prompts.decode_answer(tokenizer, one, template=template), ended=ended)
        for one, ended in zip(answers, rollout.ended.tolist(), strict=True)
    ]
