"""Define the settings of rounds, in which policy and reward model take turns on fresh comparisons.

A round samples answers of the last policies, asks which answer of a pair is better, trains the reward model
on the votes and on all comparisons so far, and trains the policy on. Only the flow ``rounds`` uses these
settings.
"""

from typing import Annotated, Literal

from pydantic import Field

from tasks.config.sections.base import NotInKey, Settings, as_choice


class RoundSample(Settings):
    """Which answers are sampled, of which the pairs are made."""

    answers: int = Field(2, ge=1, le=64, description="Answers of each policy to each prompt.")
    policies: int = Field(2, ge=1, le=10, description="How many of the last policies answer.")
    sft: bool = Field(
        False,
        description="The SFT model answers in every round; false: only in the first one of rounds.start=sft.",
    )
    prompts: int | None = Field(
        None,
        ge=1,
        description="Prompts of the rl split in a round, drawn by their ids; null: all but those of "
        "ppo.score.prompts, which are never asked about.",
    )
    temperature: float = Field(1.0, gt=0, le=10, description="Sampling temperature.")
    batch_size: int = Field(
        200,
        ge=1,
        description="Answers sampled at a time; it affects the result, because padding changes the last "
        "digits.",
    )


class RoundChoice(Settings):
    """Which pairs of the sampled answers are asked about."""

    by: Literal["random", "disagreement"] = Field(
        "random",
        description="random, or those on whose order the members of the last reward model disagree most "
        "(Christiano et al. 2017; needs reward.members of at least 2).",
    )
    pairs_per_question: int = Field(1, ge=1, le=100, description="Pairs asked per question, at most.")
    alike: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Answers of which this share of all three-word runs is common (Jaccard index) count as "
        "one answer, and are never asked against each other.",
    )
    confidence: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="Leave out pairs that every member of the reward model decides the same way with at "
        "least this probability; null: none is left out.",
    )


class GoldLabels(Settings):
    """Labels from the gold scorer of the built-in site, with planted mistakes."""

    kind: Literal["gold"] = "gold"
    noise: float = Field(0.1, ge=0, le=0.5, description="Probability with which a verdict is turned round.")
    tie: float = Field(0.0, ge=0, description="Difference in points up to which two answers tie.")


class JudgeLabels(Settings):
    """Labels from a judge, which is asked in both orders."""

    kind: Literal["judge"] = "judge"
    by: Literal["lm", "held_out"] = Field(
        "lm",
        description="The language model of judge.kind (lm), or the member of the last reward model that PPO "
        "never sees (held_out; needs reward.held_out_member).",
    )


class FileLabels(Settings):
    """Labels from a file of rows."""

    kind: Literal["file"] = "file"
    path: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        min_length=1,
        description="JSON lines or parquet with pair_id, or prompt, first and second, and with verdict and "
        "rater.",
    )


class PeopleLabels(Settings):
    """Labels from people."""

    kind: Literal["people"] = "people"
    gold_questions: int = Field(
        10, ge=0, le=10_000, description="Questions with a known answer that are mixed in, to find raters "
        "who guess."
    )  # fmt: skip
    overlap: float = Field(
        0.1, ge=0, le=1, description="Share of the pairs that a second rater labels too, for the agreement."
    )
    least: int = Field(1, ge=1, le=100_000, description="Labels without which a round does not go on.")
    least_right: float = Field(
        0.7,
        ge=0,
        le=1,
        description="Leave out the labels of a rater who is shown to have fewer than this share of the gold "
        "questions right (the whole 95 % interval lies below it).",
    )
    timeout_hours: float = Field(
        336.0, gt=0, le=8760, description="Hours for which a round waits for labels."
    )


RoundLabels = Annotated[
    GoldLabels | JudgeLabels | FileLabels | PeopleLabels,
    Field(discriminator="kind", json_schema_extra=as_choice),
]


class Rounds(Settings):
    """Rounds of fresh comparisons; only `alignflow rounds` and its flow run them."""

    count: int = Field(3, ge=1, le=20, description="Rounds, at most.")
    start: Literal["policy", "sft"] = Field(
        "policy",
        description="policy: a reward model and a policy are trained on votes before the first round; sft: "
        "the first answers are the SFT model's.",
    )
    continue_policy: bool = Field(
        True,
        description="Train each round's policy on from the last one's that has not lost; false: from the "
        "SFT model (InstructGPT). The KL is measured from the SFT model in both cases.",
    )
    comparisons: int = Field(
        200, ge=1, le=100_000, description="Pairs asked per round; ties count, gold questions do not."
    )
    old_share: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of votes among the reward model's pairs; 0: votes are not learnt from. The "
        "comparisons of all rounds are always learnt from.",
    )
    stop: Literal["not_won", "lost", "never"] = Field(
        "not_won",
        description="End after a round whose policy is not shown to win against the last one (not_won), or "
        "is shown to lose (lost).",
    )
    promote: bool = Field(
        True, description="Start the promotion of the last round that won, if the flow is deployed."
    )
    sample: RoundSample = RoundSample()
    choose: RoundChoice = RoundChoice()
    labels: RoundLabels = GoldLabels()
