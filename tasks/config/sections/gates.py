"""Define which policy of a run is promoted, and the gates that it must pass first.

These settings decide what becomes of a finished run, so they are in no stage's job and in no artifact's key.
But they name the champion, which answers the questions of each run: another ``model``, or the gate
``win_rate_vs_champion`` on or off, changes the inputs of the stage answers and of those after it.
"""

import re
from typing import Annotated, Literal

from pydantic import Field

from tasks.config.sections.base import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class Gates(Settings):
    """What a policy must show before it is promoted. null switches a gate off.

    A gate that is on and lacks its figure does not pass.
    """

    win_rate_vs_champion: Share | None = Field(
        0.5,
        description="The interval of its win rate against the champion must lie above this share. The first "
        "model is compared with the base model instead, if the run has judged that.",
    )
    win_rate_vs_sft: Share | None = Field(
        0.5, description="The interval of its win rate against SFT must lie above this share."
    )
    alignment_tax: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Percentage points that it may lose against SFT on each benchmark, by the interval's "
        "upper bound; null: benchmarks do not count.",
    )
    perplexity_tax: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Per cent by which its perplexity on held-out answers may be above that of SFT, by the "
        "interval's upper bound; null: perplexity does not count.",
    )
    kl: float | None = Field(
        20.0,
        gt=0,
        description="KL divergence from SFT that it may have, in nats per answer, by the interval's upper "
        "bound.",
    )
    worst_attack: Share | None = Field(
        0.25,
        description="Share of real answers that worthless ones may out-score by the reward model, by the "
        "interval's upper bound; it counts if that model has trained the policy, or it or its held-out "
        "member has judged it.",
    )
    warnings: int | None = Field(
        0, ge=0, le=100, description="Warnings that the policy's own training may have raised."
    )
    judge_agreement: Share | None = Field(
        0.5,
        description="The interval of the judge's agreement with held-out votes must lie above this share and "
        'above the rule "the longer answer wins".',
    )
    data_days: float | None = Field(
        None, gt=0, le=36_500, description="Days since the source was read, at most; null: any age."
    )


class Promotion(Settings):
    """Which policy of a run is registered, and what makes it the champion."""

    model: str = Field(
        "",
        max_length=200,
        pattern=r"^[^/:@]*$",
        description="Name of the registered model in MLflow; empty: rlhf-policy-PROFILE.",
    )
    policy: Literal["auto", "ppo", "dpo"] = Field(
        "auto", description="The policy that is registered; auto: the one with the best win rate against SFT."
    )
    judge: Literal["auto", "gold", "lm", "held_out", "reward"] = Field(
        "auto",
        description="The judge that decides; auto: the first of gold scorer, language model, held-out reward "
        "model and reward model that has judged and that its report card does not doubt.",
    )
    approval: Literal["automatic", "person"] = Field(
        "automatic",
        description="Whether passing all gates promotes, or asks a person in Prefect's pages first.",
    )
    timeout_hours: float = Field(
        72.0, gt=0, le=8760, description="Hours that the question to a person waits; then the run fails."
    )
    after_retrain: bool = Field(
        True, description="Whether a retraining that has built something goes on to promote."
    )
    gates: Gates = Gates()

    def model_name(self, profile: str) -> str:
        """Return the name of the registered model for the runs of a profile."""
        return self.model or f"rlhf-policy-{re.sub('[/:@]', '-', profile)}"
