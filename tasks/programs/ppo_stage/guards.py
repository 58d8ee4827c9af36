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
    find_departures,
    mean_by_prompt,
    mean_statistics,
    measure_baseline,
)
from tasks.rlhf.training.rollouts import PpoModels, Rollout

IN_A_ROW = 2  # batches
LEAST_PROMPTS = 8  # of a batch whose text is compared: fewer say too little
RAISE, MOST_RAISES = 1.5, 7  # factor of the KL penalty's weight at each alarm; seven make it 17

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

    If an alarm stops training, ``good`` holds the weights that sampled the last batch without a fault.
    """

    def __init__(
        self, settings: Ppo, models: PpoModels, state: dict[str, Any], good: dict[str, Tensor]
    ) -> None:
        self.settings, self.models, self.good = settings, models, good
        known = state.get("guards", {})
        self.baseline = Baseline(*(TextStatistics(*one) for one in known["baseline"])) if known else None
        self.faults: int = known.get("faults", 0)
        self.alarms = [Alarm(*one) for one in known.get("alarms", [])]
        self.good_step: int = known.get("good_step", 0)  # optimised batches before ``good``
        self.good_figures: dict[str, float] = known.get("good_figures", {})

    def check(self, step: int, rows: list[TextStatistics], figures: dict[str, float]) -> Alarm | None:
        """Return the alarm of batch ``step`` (from 1), if there is one.

        ``rows`` describe its answers, ``figures`` are its reward, its kl in nats an answer, and others that
        are reported of the policy that is kept.
        """
        by_prompt = mean_by_prompt(rows, self.settings.group_size)
        if self.baseline is None:
            self.baseline = measure_baseline(by_prompt) if len(by_prompt) > 1 else Baseline(rows[0], rows[0])
        reason = self._find_fault(by_prompt, figures["kl"])
        if not reason:
            self.faults = 0
            self._keep(step - 1, figures)
            return None
        self.faults += 1
        if self.faults < IN_A_ROW:
            return None
        alarm = Alarm(step, reason, self.settings.on_alarm)
        self.alarms.append(alarm)
        return alarm

    def _keep(self, steps_done: int, figures: dict[str, float]) -> None:
        """Remember the weights as good, if an alarm may return to them."""
        if self.settings.on_alarm == "stop":
            self.good = {name: one.detach().clone() for name, one in self.models.trained.items()}
            self.good_step, self.good_figures = steps_done, figures

    @property
    def has_stopped(self) -> bool:
        """Return whether an alarm has ended the training."""
        return bool(self.alarms) and self.settings.on_alarm == "stop"

    @property
    def kl_factor(self) -> float:
        """Return what the weight of the KL penalty is multiplied by at the alarm that has just been."""
        is_raised = self.settings.on_alarm == "raise_kl" and len(self.alarms) <= MOST_RAISES
        return RAISE if is_raised else 1.0

    def _find_fault(self, by_prompt: list[TextStatistics], kl: float) -> str:
        """Return a phrase about what is wrong with a batch, "" if nothing is."""
        assert self.baseline is not None
        budget, limit = self.settings.kl_budget, self.settings.text_alarm
        if budget is not None and kl > budget:
            return f"the KL from the SFT model was {kl:.1f} nats an answer, above ppo.kl_budget={budget:g}"
        if limit is None or len(by_prompt) < LEAST_PROMPTS:
            return ""
        batch = mean_statistics(by_prompt)
        found = find_departures(self.baseline, batch, len(by_prompt))
        far = [one for one in found if one.standard_errors > limit and one.deviations > 1]
        if not far:
            return ""
        worst = max(far, key=lambda one: one.standard_errors)
        now, usual = getattr(batch, worst.name), getattr(self.baseline.mean, worst.name)
        return (
            f"the answers have left the SFT model's range: {NAMES[worst.name]} {now:.3g} against "
            f"{usual:.3g}, {worst.standard_errors:.0f} standard errors away"
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Give policy and critic the weights that sampled the last batch without a fault."""
        for name, parameter in self.models.trained.items():
            parameter.copy_(self.good[name])

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, beside ``good``."""
        names = ("baseline", "faults", "alarms", "good_step", "good_figures")
        return {"guards": {name: getattr(self, name) for name in names}}

    def warnings(self) -> list[str]:
        """Return sentences on the first alarm, if there was one."""
        if not self.alarms:
            return []
        first, count = self.alarms[0], len(self.alarms)
        raised = f"{RAISE ** min(count, MOST_RAISES):.3g}"
        kept = f"that of step {self.good_step}" if self.good_step else "the SFT model: nothing was learnt"
        done = {
            "warn": "Training went on: ppo.on_alarm=stop ends it with the weights before the fault.",
            "raise_kl": f"The weight of the KL penalty was raised, in all to {raised} times what it was.",
            "stop": f"Training ended, and the policy is {kept}. A lower ppo.learning_rate or a higher "
            "ppo.kl_coefficient trains longer.",
        }[first.action]
        others = f" The alarm rang {count - 1} more times." if count > 1 else ""
        return [f"In step {first.step} {first.reason}. {done}{others}"]


def describe_rollout(rollout: Rollout, encoder: Encoder) -> list[TextStatistics]:
    """Return the statistics of each answer."""
    tokenizer, template = encoder.tokenizer, encoder.template
    ids, mask = rollout.batch
    answers = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    return [
        describe_answer(one, prompts.decode_answer(tokenizer, one, template=template), ended=ended)
        for one, ended in zip(answers, rollout.ended.tolist(), strict=True)
    ]
