"""Watch PPO for faults, and act on them: warn, hold the policy, roll back, or stop.

A batch is faulty if its text has degenerated (text_guard.py), if its KL is above the budget, or if a figure
of the step before is far outside its recent range (spikes.py); two in a row are an alarm. So are two
measurements of the independent score far below its best (plateau.py). The first batch of answers that they
see is the SFT model's own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.config.sections.ppo import Ppo
from tasks.programs.ppo_stage import plateau
from tasks.programs.ppo_stage.independent_score import IndependentScore, Measurement
from tasks.programs.ppo_stage.spikes import describe_spike, remember
from tasks.programs.ppo_stage.text_guard import describe_text_fault
from tasks.rlhf.evaluation.text_statistics import Baseline, TextStatistics, mean_by_prompt, measure_baseline
from tasks.rlhf.training.ppo_state import Optimizers
from tasks.rlhf.training.rollouts import PpoModels

IN_A_ROW = 2  # batches
RAISE, MOST_RAISES = 1.5, 7  # factor of the KL penalty's weight at each alarm; seven make it 17
ROLL_BACK, MOST_ROLL_BACKS = 2.0, 3  # the same for roll_back
LEAST_WEIGHT = 0.05  # of the KL penalty after a roll_back, if there was none

ACTIONS = ("warn", "raise_kl", "roll_back", "stop")  # logged as 1, 2, 3, 4


class Alarm(NamedTuple):
    """What was seen, and what was done about it."""

    step: int
    reason: str
    action: str


class Guards:
    """Checks each batch of answers before the policy learns from it.

    ``good`` holds the weights to return to: those with the best independent score, or without one those that
    sampled the last batch without a fault.
    """

    def __init__(
        self,
        settings: Ppo,
        models: PpoModels,
        state: dict[str, Any],
        good: dict[str, Tensor],
        score: IndependentScore | None = None,
    ) -> None:
        self.settings, self.models, self.good, self.score = settings, models, good, score
        known = state.get("guards", {})
        self.baseline: Baseline | None = None
        if "baseline" in known:
            self.baseline = Baseline(*(TextStatistics(*one) for one in known["baseline"]))
        self.faults: int = known.get("faults", 0)
        self.alarms = [Alarm(*one) for one in known.get("alarms", [])]
        self.good_step: int = known.get("good_step", 0)  # optimised batches before ``good``
        self.good_figures: dict[str, float] = known.get("good_figures", {})
        self.best = Measurement(*known["best"]) if known.get("best") else None
        self.falls: int = known.get("falls", 0)  # measurements in a row
        self.ranges: dict[str, list[float]] = known.get("ranges", {})
        self.spike: str = known.get("spike", "")
        self.last_fall = ""  # how far the last weights are below the best
        self.has_returned = False  # the weights are ``good``, and nothing was learnt since
        self.metrics: dict[str, float] = {}  # what is logged of the step that was checked

    def start(self, rows: list[TextStatistics]) -> None:
        """Measure the SFT model, which the policy is before other weights are loaded.

        ``rows`` describe a batch of its answers.
        """
        self._set_baseline(mean_by_prompt(rows, self.settings.group_size))
        if self.score:
            self.score.start()

    def _set_baseline(self, by_prompt: list[TextStatistics]) -> None:
        few = Baseline(by_prompt[0], by_prompt[0])
        self.baseline = measure_baseline(by_prompt) if len(by_prompt) > 1 else few

    def check(self, step: int, rows: list[TextStatistics], figures: dict[str, float]) -> Alarm | None:
        """Return the alarm of batch ``step`` (from 1), if there is one.

        ``rows`` describe its answers, ``figures`` are its reward, its kl in nats an answer, and others that
        are reported of the policy that is kept.
        """
        self.has_returned = False
        by_prompt = mean_by_prompt(rows, self.settings.group_size)
        if self.baseline is None:
            self._set_baseline(by_prompt)
        measured = self.score.measure(step - 1) if self.score else None
        self.metrics = measured.point if measured else {}
        fault, fall = self._find_fault(by_prompt, figures["kl"]), self._find_fall(measured)
        self.faults = self.faults + 1 if fault else 0
        if measured:
            self.falls = self.falls + 1 if fall else 0
        is_first = not self.good_figures  # a policy that goes on from another may begin faulty
        if is_first or not (fault or fall):
            self._keep(step - 1, figures, measured)
        reason = fall if self.falls >= plateau.IN_A_ROW and fall else fault if self.faults >= IN_A_ROW else ""
        return self._ring(step, reason) if reason else None

    def _ring(self, step: int, reason: str) -> Alarm:
        alarm = Alarm(step, reason, self._choose_action())
        self.alarms.append(alarm)
        self.metrics = self.metrics | {"alarm": ACTIONS.index(alarm.action) + 1}
        return alarm

    def _choose_action(self) -> str:
        """Return what is done at the next alarm: a policy that is rolled back again and again is stopped."""
        action = self.settings.on_alarm
        is_spent = action == "roll_back" and len(self.alarms) >= MOST_ROLL_BACKS
        return "stop" if is_spent else action

    def _find_fault(self, by_prompt: list[TextStatistics], kl: float) -> str:
        """Return a phrase about what is wrong with a batch, or with the step before, "" if nothing is."""
        assert self.baseline is not None
        budget, limit = self._kl_budget(self.baseline), self.settings.text_alarm
        if budget is not None and kl > budget:
            name = "kl_budget" if self.settings.kl_budget else "kl_budget_per_token"
            setting = f"ppo.{name}={getattr(self.settings, name):g}"
            return (
                f"the KL from the SFT model was {kl:.1f} nats an answer, above the {budget:.3g} of {setting}"
            )
        text = describe_text_fault(self.baseline, by_prompt, limit) if limit is not None else ""
        return text or self.spike

    def _kl_budget(self, baseline: Baseline) -> float | None:
        """Return the most nats an answer, None if any are allowed."""
        if self.settings.kl_budget is not None:
            return self.settings.kl_budget
        rate = self.settings.kl_budget_per_token
        return None if rate is None else rate * baseline.mean.length

    def _find_fall(self, measured: Measurement | None) -> str:
        """Return a phrase on how the independent score has fallen, "" if it was not measured or has not."""
        if measured is None or self.best is None or self.score is None:
            return ""
        fall = plateau.describe_fall(self.best, measured)
        return fall or plateau.describe_divergence(self.score.recent)

    def _keep(self, steps_done: int, figures: dict[str, float], measured: Measurement | None) -> None:
        """Remember the weights as good: the best by the score, without one each without a fault."""
        if self.score is not None:
            if measured is None or (self.best and measured.score.value <= self.best.score.value):
                return
            self.best = measured
        self.good_step, self.good_figures = steps_done, figures
        if self.settings.on_alarm in ("stop", "roll_back") or (self.score and self.settings.keep == "best"):
            self.good = {name: one.detach().clone() for name, one in self.models.trained.items()}

    def observe(self, figures: Mapping[str, float]) -> None:
        """Compare the figures of a step with those of the steps before; the next check reads the result."""
        limit = self.settings.spike_alarm
        self.spike = "" if limit is None else describe_spike(self.ranges, figures, limit)
        self.ranges = remember(self.ranges, figures)

    def raise_weight(self, kl_coefficient: float) -> float:
        """Return the weight of the KL penalty after the alarm that has just been."""
        action, count = self.alarms[-1].action, len(self.alarms)
        if action == "roll_back":
            return max(LEAST_WEIGHT, kl_coefficient * ROLL_BACK)
        return kl_coefficient * (RAISE if action == "raise_kl" and count <= MOST_RAISES else 1.0)

    @torch.no_grad()
    def restore(self, optimizers: Optimizers | None = None) -> None:
        """Give policy and critic the good weights, and start ``optimizers`` and the ranges afresh."""
        for name, parameter in self.models.trained.items():
            parameter.copy_(self.good[name])
        for optimizer in optimizers.each if optimizers else []:
            optimizer.state.clear()
        self.faults, self.falls, self.ranges, self.spike = 0, 0, {}, ""
        if self.score:
            self.score.forget()
        self.has_returned = True

    def finish(self, step: int) -> None:
        """Measure the last weights, after ``step`` batches, and give the policy those that are handed on.

        These are the last ones, unless they are far below the best.
        """
        if self.score is None or self.best is None or self.has_returned:
            return
        last = self.score.measure(step, is_last=True)
        assert last is not None
        self.last_fall = plateau.describe_fall(self.best, last)
        if last.score.value > self.best.score.value:
            self.best, self.good_step = last, step
        elif self.last_fall and self.settings.keep == "best":
            self.restore()

    @property
    def has_stopped(self) -> bool:
        """Return whether an alarm has ended the training."""
        return bool(self.alarms) and self.alarms[-1].action == "stop"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs, beside ``good``."""
        names = (
            "baseline", "faults", "alarms", "good_step", "good_figures", "best", "falls", "ranges", "spike",
        )  # fmt: skip
        return {"guards": {name: getattr(self, name) for name in names}} | (
            self.score.state() if self.score else {}
        )
