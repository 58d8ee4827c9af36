"""Define the settings of what PPO's answers are scored with."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import NotInKey, Settings
from tasks.config.sections.models import Precision

OWN = "model"  # the run's own reward model in metrics, as reward_model
NAME = r"^[a-z][a-z0-9_]{0,30}$"
_NAME = Field(pattern=NAME, description="Name in metrics and messages: its mean is reward_NAME.")
FILES = NotInKey("the files are an input, known by their content")


class OtherRewardModel(Settings):
    """A reward model beside the run's own: on the same base, on another one, or with weights of its own."""

    name: str = _NAME
    path: Annotated[str, FILES] = Field(
        min_length=1,
        description="Folder of a reward model: the artifact of a stage reward, or a sequence classification "
        "model with one label in Hugging Face format.",
    )
    base: Annotated[str, FILES] = Field(
        "",
        description="Folder of the model that an adapter of a stage reward was trained on; empty: this run's "
        "SFT model.",
    )
    precision: Precision | None = Field(
        None, description="Precision of the base that is named, or of the model; null: as it is stored."
    )
    weight: float = Field(1.0, description="Weight of its normalised reward in the score.")
    template: Literal["question-answer", "human-assistant", "chat"] | None = Field(
        None, description="How it reads question and answer; null: chat if its tokenizer has a chat template "
        "and it is no artifact of a stage reward, else text.template.",
    )  # fmt: skip
    max_prompt_tokens: int | None = Field(
        None, ge=8, description="Longer prompts are cut for it; null: 4 times text.max_prompt_tokens, if it "
        "reads as many.",
    )  # fmt: skip
    max_answer_tokens: int | None = Field(
        None, ge=1, description="Longer answers are cut for it; null: 4 times text.max_answer_tokens, if it "
        "reads as many.",
    )  # fmt: skip


class RewardFunction(Settings):
    """A function of yours that scores answers."""

    name: str = _NAME
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="module:function, importable wherever the stage runs (PYTHONPATH). It is called with a "
        "list of questions and a list of answers, as text, and returns a number for each.",
    )
    weight: float = Field(1.0, description="Weight of its number in the score, as it is.")

    @property
    def module(self) -> str:
        """Return the module's name."""
        return self.function.partition(":")[0]


class Rewards(Settings):
    """What answers are scored with: a weighted sum of normalised rewards and of numbers of functions."""

    model_weight: float = Field(
        1.0, ge=0, description="Weight of this run's own reward model; 0: the others replace it."
    )
    models: tuple[OtherRewardModel, ...] = Field(
        (), description="Reward models beside it: [{name: harmless, path: FOLDER, weight: 0.5}]."
    )
    functions: tuple[RewardFunction, ...] = Field(
        (), description="Functions beside it: [{name: short, function: 'my_rewards:short', weight: 0.1}]."
    )
    running_normalisation: bool = Field(
        False,
        description="Shift and scale the sum to mean 0 and standard deviation 1 over all answers so far, "
        "before max_score clips it.",
    )

    @property
    def parts(self) -> tuple[OtherRewardModel | RewardFunction, ...]:
        """Return what is beside the run's own reward model."""
        return (*self.models, *self.functions)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        names = [OWN, *(part.name for part in self.parts)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            reserved = " (the name of the run's own reward model)" if twice == [OWN] else ""
            raise ValueError(f"two rewards are called {twice[0]}{reserved}: give each a name of its own")
        if not self.model_weight and not self.parts:
            raise ValueError("model_weight is 0 and there is no other reward: add models or functions")
        if idle := [part.name for part in self.parts if not part.weight]:
            raise ValueError(f"the weight of {idle[0]} is 0: leave it out, or give it a weight")
        return self
