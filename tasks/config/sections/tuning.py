"""Define the settings that all stages with supervised training share."""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config.sections.base import NotInKey, Settings


class Lora(Settings):
    """A low-rank adapter (Hu et al. 2021)."""

    rank: int = Field(16, ge=1, le=1024, description="Rank r of the update.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Modules to adapt: 'all-linear' or a list of names."
    )


class Bottleneck(Settings):
    """Two linear layers and an activation, in place of each MLP or beside it (Houlsby et al. 2019)."""

    form: Literal["replace", "parallel"] = Field(
        "parallel",
        description="replace: in place of the MLP; parallel: added to it, so that the untrained model is the "
        "base.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Width of the bottleneck; null: the greatest with which at most half of the parameters "
        "are trained.",
    )
    whole_layers: bool = Field(False, description="Train the layers' attention and norms as well, in fp32.")


class Tuning(Settings):
    """The settings that SFT, reward model and DPO share."""

    lora: Lora = Lora()
    epochs: float = Field(1.0, gt=0, le=100, description="Passes over the training part.")
    max_steps: int | None = Field(
        None, ge=1, description="Stop after this many optimizer steps, even if the epochs are not complete."
    )
    learning_rate: float = Field(2e-3, gt=0, le=1, description="Peak AdamW learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="How the learning rate goes on after the warm-up: to 0, or not."
    )
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="Share of the steps over which the learning rate rises."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="The gradient's norm is clipped to this.")
    evaluations: int = Field(
        4,
        ge=1,
        description="How many times the held-out loss is measured, evenly spread; the last time at the end.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in a row without a better held-out loss; null: never.",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Which weights become the result: those of the best evaluation, or the last."
    )
    start: Annotated[str, NotInKey("the weights are an input, known by their content")] = Field(
        "",
        description="Weights to start from: an artifact's folder, or a file in safetensors format; empty: "
        "new ones.",
    )
