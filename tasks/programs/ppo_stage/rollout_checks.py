"""Check rollouts: all assumptions at each start and each resume, and at every step that the KL is one.

A check that fails ends the run with one sentence, which names the cause: kl_diagnosis.py in
tasks/rlhf/training/ finds it.
"""

from typing import Any

from torch import Tensor

from tasks.config.jobs import PpoJob
from tasks.rlhf.algorithms import sanity_checks
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.training import kl_diagnosis
from tasks.rlhf.training.rollouts import PpoModels, Rollout, kl_estimates

SAMPLER = "the sampler warps its distribution, or left padding shifts positions."
MOVED = (
    "Frozen weights changed during training. "
    "Likely cause: the optimizer was given the base's or the reward model's."
)


class RolloutChecks:
    """Checks the rollouts of one run of the program.

    ``frozen`` are the weights that nothing may change; ``state`` is that of a checkpoint, or empty. Raises
    StepZeroError if they are others than when the run was started.
    """

    def __init__(
        self,
        job: PpoJob,
        models: PpoModels,
        encoder: Encoder,
        frozen: list[Tensor],
        state: dict[str, Any],
        *,
        tolerance: float,
    ) -> None:
        tokenizer, template = encoder.tokenizer, encoder.template
        assert isinstance(tokenizer.pad_token_id, int)
        self.models, self.frozen, self.tolerance = models, frozen, tolerance
        self.is_resumed, self.has_started = bool(state), False
        self.settings = kl_diagnosis.Settings(
            job.ppo.temperature, prompts.end_tokens(tokenizer, template), tokenizer.pad_token_id, tolerance
        )
        self.digest = sanity_checks.digest(frozen)
        self.unexplained: list[int] = []  # steps with a KL below 0 for no cause that was found
        before: dict[str, str] = state.get("frozen", {})
        dtype = str(models.model.dtype)  # a CPU without bfloat16 computes with other bytes
        if before.get("dtype") == dtype and before["digest"] != self.digest:
            raise StepZeroError(
                "The frozen weights are not those that the run was started with, so the KL would be that "
                "from another reference. Likely cause: the base or the reward model was replaced; start the "
                "stage again."
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"frozen": {"dtype": str(self.models.model.dtype), "digest": self.digest}}

    def check(self, rollout: Rollout, step: int) -> None:
        """Check the rollout of step ``step`` (from 1). Raises StepZeroError."""
        if not self.has_started:
            self.check_start(rollout)
            self.has_started = True
        self.check_kl(rollout, step)

    def expect_trained(self) -> None:
        """Check the next rollout as that of a policy which has been trained: its KL is not 0."""
        self.is_resumed, self.has_started = True, False

    def check_start(self, rollout: Rollout) -> None:
        """Check the first rollout after a start or a resume. Raises StepZeroError."""
        mask = rollout.batch.response_mask
        assert rollout.scorer_logp is not None
        sampled, scored = rollout.sampler_logp[mask], rollout.scorer_logp[mask]
        if not (sampled - scored).abs().max() <= self.tolerance:
            cause = self._find_cause(rollout)
            sanity_checks.check_close(
                "Sampler's and scorer's log-probabilities",
                sampled,
                scored,
                tolerance=self.tolerance,
                cause=f"{cause}." if cause else SAMPLER,
            )
        if cause := kl_diagnosis.find_start_cause(self.models, rollout, self.settings):
            raise StepZeroError(f"Log-probabilities are not reproduced. Likely cause: {cause}.")
        if not self.is_resumed:
            kl = kl_estimates(rollout)
            if max(abs(kl["kl"]), abs(kl["kl_k3"])) > self.tolerance and (cause := self._find_cause(rollout)):
                raise StepZeroError(
                    f"An untrained policy is {kl['kl']:.3g} nats from its reference instead of 0. Likely "
                    f"cause: {cause}."
                )
            sanity_checks.check_fresh_kl(kl["kl"], kl["kl_k3"], tolerance=self.tolerance)

    def check_kl(self, rollout: Rollout, step: int) -> None:
        """Refuse a KL that is below 0 by more than chance, if its cause is found. Raises StepZeroError."""
        if not kl_diagnosis.is_below_zero(rollout, tolerance=self.tolerance):
            return
        cause = self._find_cause(rollout)
        if not cause:
            self.unexplained.append(step)
            return
        kl = kl_estimates(rollout)["kl"]
        raise StepZeroError(
            f"In step {step} the KL from the reference is estimated at {kl:.3g} nats an answer, and a KL is "
            f"never negative. Likely cause: {cause}."
        )

    def check_end(self) -> None:
        """Refuse a run that has changed a frozen weight. Raises StepZeroError."""
        if self._has_moved():
            raise StepZeroError(MOVED)

    def warnings(self) -> list[str]:
        """Return a sentence on steps whose KL was below 0 for no cause that was found."""
        if not self.unexplained:
            return []
        return [
            f"In {len(self.unexplained)} steps, first {self.unexplained[0]}, the estimated KL from the SFT "
            "model was below 0 by more than chance, and no cause was found: read its answers before "
            "you trust it."
        ]

    def _find_cause(self, rollout: Rollout) -> str:
        return kl_diagnosis.find_cause(self.models, rollout, self.settings, has_moved=self._has_moved)

    def _has_moved(self) -> bool:
        return sanity_checks.digest(self.frozen) != self.digest
