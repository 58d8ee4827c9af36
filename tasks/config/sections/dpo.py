"""Define the settings of direct preference optimisation."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.tuning import Bottleneck, Lora, Tuning


class Dpo(Tuning):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    tune: Literal["lora", "bottleneck", "full"] = Field(
        "lora", description="What is trained: an adapter of one of two kinds, or every weight."
    )
    lora: Lora = Lora(rank=16, alpha=32)
    bottleneck: Bottleneck = Bottleneck()
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="Rafailov et al. 2023 (label_smoothing makes it cDPO), or IPO (Azar et al. 2023).",
    )
    beta: float = Field(1.0, gt=0, description="Strength of the pull towards the reference.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels assumed flipped (cDPO).")
    nll_weight: float = Field(
        0.2,
        ge=0,
        description="Weight in the loss of the best answers' negative log-likelihood per token (Pang et al. "
        "2024; Dubey et al. 2024); 0: plain DPO.",
    )
    epochs: float = Field(0.9, gt=0, le=100, description="Passes over the training questions.")
    batch_size: int = Field(
        8,
        ge=1,
        description="Questions per optimizer step, each with all its pairs; an answer is forwarded once.",
    )
    held_out_share: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the reward split's questions that is held out of training, to choose the "
        "weights.",
    )

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to the sigmoid loss: set it to 0 with loss=ipo")
        return self
