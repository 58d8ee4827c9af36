"""Define the settings of the stages that train, merge and compare models."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import NotInKey, Settings


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


class Sft(Tuning):
    """Supervised fine-tuning on the best answer of each question."""

    tune: Literal["lora", "full"] = Field("lora", description="What is trained: an adapter, or every weight.")
    lora: Lora = Lora(rank=16, alpha=32, dropout=0.05)
    loss_on: Literal["answer", "all"] = Field(
        "answer", description="Tokens that the loss counts: the answer's, or all."
    )
    epochs: float = Field(1.7, gt=0, le=100, description="Passes over the fine-tuning split.")
    batch_size: int = Field(8, ge=1, description="Packed blocks per optimizer step.")
    block_tokens: int = Field(
        256, ge=32, description="Tokens of a packed block; documents inside it do not attend to each other."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How the learning rate goes on after the warm-up: to 0, or not."
    )
    held_out_share: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Share of the questions that is held out of training, to measure the loss.",
    )


class Merge(Settings):
    """Merging of an adapter into its base."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Precision of the merged weights; null: that of the base, or float32 if it was trained "
        "in float32.",
    )


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


class Ppo(Settings):
    """Policy gradients with a KL penalty towards the SFT model: PPO, RLOO or GRPO."""

    old_names: ClassVar[dict[str, str]] = {"accept_fooled": "allow_exploitable"}

    algorithm: Literal["ppo", "rloo", "grpo"] = Field(
        "ppo",
        description="What an answer is compared with: a critic's estimate (ppo), or the other answers to the "
        "same prompt (rloo, grpo), which needs no critic.",
    )
    answers_per_prompt: int | None = Field(
        None, ge=1, le=1024, description="Answers to each prompt; null: 1 with ppo, 4 with rloo and grpo."
    )
    scale_by_group: bool = Field(
        False,
        description="With grpo, divide by the standard deviation of a prompt's rewards, as Shao et al. 2024; "
        "it weighs prompts more on which answers differ little.",
    )
    normalise_length: bool = Field(
        False,
        description="Give each answer equal weight in the loss, not each token, as Shao et al. 2024; it "
        "favours long answers among the bad ones.",
    )
    lora: Lora = Lora(rank=16, alpha=32)
    steps: int = Field(24, ge=1, description="Rollout batches.")
    rollouts: int = Field(64, ge=2, description="Answers sampled per rollout batch.")
    epochs: int = Field(
        2, ge=1, le=100, description="Passes over each rollout batch, each in a new random order."
    )
    minibatch: int = Field(32, ge=1, description="Rollouts per optimizer step.")
    learning_rate: float = Field(
        1.5e-3, gt=0, le=1, description="Adam learning rate of policy and critic, linear to 0."
    )
    kl_coefficient: float = Field(
        0.05, ge=0, description="Weight of the KL penalty (the initial one when it adapts)."
    )
    kl_penalty: Literal["reward", "k2", "k3"] = Field(
        "reward",
        description="Where the KL penalty is: in the reward of each token (k1), or in the loss, by "
        "Schulman's estimator k2, whose gradient is that of the KL, or k3, which GRPO takes.",
    )
    kl_target: float | None = Field(
        None,
        gt=0,
        description="Nats per response that the adaptive KL controller aims at; null: the weight is fixed.",
    )
    kl_horizon: int = Field(10_000, ge=1, description="Rollouts over which the adaptive controller corrects.")
    discount: float = Field(1.0, gt=0, le=1, description="Gamma of GAE.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of GAE.")
    clip_range: float = Field(0.2, gt=0, lt=1, description="Clip range of the probability ratio.")
    dual_clip: float | None = Field(
        3.0, gt=1, description="Bound of the loss for negative advantages; null: none."
    )
    value_clip_range: float = Field(0.2, gt=0, description="Clip range of the value update.")
    value_weight: float = Field(0.1, ge=0, description="Weight of the value loss.")
    critic_warmup_steps: int = Field(
        0, ge=0, description="Rollout batches at the start in which the critic alone learns."
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradient norms of policy and critic are clipped to this."
    )
    max_step_kl: float | None = Field(
        1.0,
        gt=0,
        description="Skip an optimizer step if the approximate KL from the sampling policy (nats per token) "
        "is above this; null: never.",
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="Divides the logits, in sampling and in scoring."
    )
    allow_exploitable: Annotated[bool, NotInKey("it only decides whether PPO starts")] = Field(
        True,
        description="Whether to train against a reward model that prefers worthless answers to real ones; "
        "false: stop with an error.",
    )
    max_score: float | None = Field(
        None, gt=0, description="Normalised rewards are clipped to plus and minus this; null: never."
    )
    missing_eos: Literal["replace", "add"] = Field(
        "replace",
        description="Whether missing_eos_reward replaces the normalised reward of a response without an end "
        "token, or is added to it.",
    )
    missing_eos_reward: float = Field(
        -3.0, description="Reward of a response without an end token, or what is added to it."
    )

    @property
    def group_size(self) -> int:
        """Return the number of answers to each prompt."""
        return self.answers_per_prompt or (1 if self.algorithm == "ppo" else 4)

    @model_validator(mode="after")
    def _check_dropout(self) -> Self:
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0: with dropout the first ratio is not 1")
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.algorithm != "ppo" and self.group_size < 2:
            raise ValueError(
                f"{self.algorithm} compares the answers to one prompt: set answers_per_prompt to 2 or more"
            )
        if self.rollouts % self.group_size:
            raise ValueError(
                f"rollouts, {self.rollouts}, must be a multiple of answers_per_prompt, {self.group_size}"
            )
        if self.scale_by_group and self.algorithm != "grpo":
            raise ValueError("scale_by_group is for algorithm=grpo")
        if self.critic_warmup_steps and self.algorithm != "ppo":
            raise ValueError(f"{self.algorithm} has no critic: set critic_warmup_steps to 0")
        return self


class Winrate(Settings):
    """Comparison of the trained policies on held-out questions."""

    num_questions: int = Field(
        500, ge=1, description="Held-out questions answered by every policy (at most what the split has)."
    )
    num_graded_pairs: int = Field(
        2000, ge=0, description="Held-out pairs of voted answers that each judge is graded on, at most."
    )
    temperature: float = Field(0.7, gt=0, le=10, description="Sampling temperature of every policy.")
    batch_size: int = Field(
        200,
        ge=1,
        description="Questions answered at a time; it affects the result, because padding changes the last "
        "digits.",
    )
