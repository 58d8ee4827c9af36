"""Define the settings of the reward model."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import Settings
from tasks.config.sections.tuning import Lora, Tuning

HardNegative = Literal["unrelated", "wrong_name", "truncated", "repeated"]


class HardNegatives(Settings):
    """Comparisons made without people: a question's best answer against one that is made to be worse."""

    share: float = Field(
        0.0,
        ge=0,
        description="Comparisons made for each training question, on average; 0: none. At most the number of "
        "kinds.",
    )
    kinds: tuple[HardNegative, ...] = Field(
        ("unrelated", "wrong_name", "truncated", "repeated"),
        min_length=1,
        description="What is made: the best answer of another question; the own best answer with a name that "
        "it copies from the question exchanged for another, cut to its first third, or said twice.",
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError("a kind is named twice: name each of kinds once")
        if self.share > len(self.kinds):
            raise ValueError(
                "a question gets one comparison of each kind at most: set share to "
                f"{len(self.kinds)} or less, or name more kinds"
            )
        return self


class Reward(Tuning):
    """The reward model."""

    old_names: ClassVar[dict[str, str]] = {
        "attacked": "red_team_answers",
        "caution": "uncertainty_penalty",
        "head_start": "age_bias",
        "most_answers": "max_answers",
    }

    tune: Literal["lora", "full"] = Field(
        "lora", description="What is trained beside the score head: an adapter, or every weight."
    )
    lora: Lora = Lora(rank=8, alpha=32)
    comparisons: Literal["pairs", "rankings"] = Field(
        "pairs",
        description="pairs: those that the data stage drew; rankings: every pair of each question's answers "
        "(K-wise).",
    )
    max_answers: int = Field(
        9,
        ge=2,
        le=100,
        description="Most answers of a ranking (InstructGPT: 4 to 9); of more, some are left out, evenly by "
        "score.",
    )
    weigh: Literal["pairs", "questions"] = Field(
        "pairs", description="What has equal weight in the loss: each pair, or each question (InstructGPT)."
    )
    margin: float = Field(
        0.0,
        ge=0,
        description="Margin of the better answer's reward, in nats per point of the score gap (Touvron et "
        "al. 2023); 0: none.",
    )
    centring: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared sum of a pair's rewards, which keeps their mean at 0 (Eisenstein "
        "et al. 2023).",
    )
    age_bias: bool = Field(
        False,
        description="Estimate from the pairs how much more often the older of two answers wins, and add that "
        "to its side (Davidson and Beaver 1977), so that rewards need not explain votes for being early. The "
        "rewards themselves do not depend on age.",
    )
    probe: bool = Field(
        False,
        description="Initialise the score head by a logistic regression on the features of the untrained "
        "model (Kumar et al. 2022) instead of at random: one pass without gradients over all answers, and "
        "some fits. The probe counts as the first evaluation, for keep and for patience.",
    )
    members: int = Field(
        1,
        ge=1,
        le=16,
        description="Members of an ensemble, each an adapter and a score head on the same base (needs "
        "tune=lora).",
    )
    held_out_member: bool = Field(
        False,
        description="Train one more member, which PPO never sees, as a judge of the policies (needs "
        "tune=lora).",
    )
    uncertainty_penalty: float = Field(
        0.5,
        ge=0,
        description="Standard deviations of the ensemble's rewards that are subtracted from their mean "
        "(Coste et al. 2023).",
    )
    epochs: float = Field(2.0, gt=0, le=100, description="Passes over the training questions.")
    batch_size: int = Field(
        8,
        ge=1,
        description="Questions per optimizer step, each with all its pairs; an answer is forwarded once.",
    )
    held_out_share: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the reward split's questions that is held out of training, to choose weights "
        "and temperature.",
    )
    red_team_answers: int = Field(
        512,
        ge=2,
        le=100_000,
        description="Real answers that worthless ones are compared with (at most what the split has).",
    )
    hard_negatives: HardNegatives = HardNegatives()

    @property
    def num_trained(self) -> int:
        """Return the number of members that are trained, with the one that PPO never sees."""
        return self.members + self.held_out_member

    @model_validator(mode="after")
    def _check_ensemble_and_probe(self) -> Self:
        several = "members to 1 and held_out_member to false"
        if self.num_trained > 1 and self.tune == "full":
            raise ValueError(
                f"members of an ensemble share a base, so they are adapters: set tune to lora, or {several}"
            )
        if self.num_trained > 1 and self.start:
            raise ValueError(
                "members of an ensemble that all start from the same weights would agree: set start to '', "
                f"or {several}"
            )
        if self.probe and self.centring:
            raise ValueError(
                "centring holds the rewards' mean at 0, where a probe's is not: set centring to 0, or probe "
                "to false"
            )
        if self.probe and self.start:
            raise ValueError(
                "the score head begins with the weights of start or with a probe: set start to '', or probe "
                "to false"
            )
        return self
