"""Define the settings of PPO, RLOO and GRPO."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import NotInKey, Settings
from tasks.config.sections.rewards import Rewards
from tasks.config.sections.tuning import Lora


class PretrainingMix(Settings):
    """Text whose likelihood the policy is to keep: PPO-ptx (Ouyang et al. 2022, equation 2)."""

    weight: float = Field(
        0.0, ge=0, description="Weight of the text's loss, in nats per token, in that of the policy; 0: none."
    )
    gradient_share: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Set the weight so that the norm of the text's gradient is this share of the policy's, "
        "as measured over the first measured_steps; null: take weight.",
    )
    measured_steps: int = Field(16, ge=1, description="Optimizer steps over which gradient_share measures.")
    path: Annotated[str, NotInKey("the file is an input, known by its content")] = Field(
        "",
        description="Text of your own: a file of JSON lines or parquet with a column text, which is read "
        "from its beginning, as far as the steps need; empty: the best answers of the fine-tuning split.",
    )
    blocks: int = Field(8, ge=1, description="Packed blocks of text per optimizer step.")
    block_tokens: int | None = Field(
        None,
        ge=32,
        description="Tokens of a block; documents inside it do not attend to each other. null: as many as a "
        "prompt with its answer.",
    )

    @property
    def is_on(self) -> bool:
        """Return whether text is mixed in."""
        return self.weight > 0 or self.gradient_share is not None

    @model_validator(mode="after")
    def _check_weight(self) -> Self:
        if self.weight and self.gradient_share is not None:
            raise ValueError("weight and gradient_share both set the weight: give one of them")
        if self.path and not self.is_on:
            raise ValueError("path names text that has no weight: set weight or gradient_share")
        return self


class IndependentScore(Settings):
    """Scores of the policy, while it trains, by something that PPO does not maximise."""

    by: Literal["held_out", "gold", "judge"] | None = Field(
        None,
        description="The member of the reward model that PPO never sees (held_out; it needs "
        "reward.held_out_member), the gold scorer of the built-in site (gold), or how often the language "
        "model of judge.kind prefers the policy's answers to the SFT model's own (judge); null: none.",
    )
    every: int = Field(4, ge=1, description="Rollout batches between two measurements.")
    prompts: int = Field(
        64,
        ge=8,
        le=10_000,
        description="Prompts of the rl split that PPO does not learn from, each answered at every "
        "measurement.",
    )
    best_of: int = Field(
        16,
        ge=1,
        le=1024,
        description="Answers of the SFT model to each of these prompts, for best-of-n beside PPO in the "
        "report; 1: none. With by=judge only the answer with the best reward is judged.",
    )


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
    start: Annotated[str, NotInKey("the weights are an input, known by their content")] = Field(
        "",
        description="A policy to go on from: the folder of an artifact or of its adapter, or a file in "
        "safetensors format, of the same rank, alpha and targets; empty: the SFT model, from which the KL "
        "is measured in any case.",
    )
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
    entropy_weight: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Weight in the loss of the policy's entropy, in nats per token, which keeps it "
        "undecided; 0: none.",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="Gradient norms of policy and critic are clipped to this."
    )
    max_step_kl: float | None = Field(
        0.1,
        gt=0,
        description="Skip an optimizer step if the approximate KL from the sampling policy (half the mean "
        "squared log-ratio, nats per token) is above this; null: never.",
    )
    temperature: float = Field(
        1.0, gt=0, le=10, description="Divides the logits, in sampling and in scoring."
    )
    sampler: Literal["plain", "continuous_batching"] = Field(
        "plain",
        description="How answers are sampled: by the pipeline's own loop (plain), or by transformers' "
        "continuous batching, an engine for GPUs with paged attention.",
    )
    importance_cap: float | None = Field(
        2.0,
        ge=1,
        description="Where the sampler's probability of a token is not the policy's (half precision, "
        "continuous_batching), its gradient is weighed by their ratio, at most by this; null: it is not.",
    )
    allow_exploitable: Annotated[bool, NotInKey("it only decides whether PPO starts")] = Field(
        True,
        description="Whether to train against a reward model that prefers worthless answers to real ones; "
        "false: stop with an error.",
    )
    rewards: Rewards = Rewards()
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

    ptx: PretrainingMix = PretrainingMix()
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="Most KL from the SFT model, in nats per response; null: as kl_budget_per_token says.",
    )
    kl_budget_per_token: float | None = Field(
        0.25,
        gt=0,
        description="Most KL from the SFT model, in nats per response for each token of that model's mean "
        "answer in the first batch, if kl_budget is null; null: any. Ziegler et al. 2019 aimed at 6 nats for "
        "24 tokens.",
    )
    text_alarm: float | None = Field(
        6.0,
        gt=0,
        description="Standard errors by which a batch's text may be worse than the SFT model's (repetition, "
        "code fences, length, missing ends) before it is a fault, if it is also worse by a standard "
        "deviation of its prompts; null: any. It needs eight prompts a batch.",
    )
    spike_alarm: float | None = Field(
        8.0,
        gt=0,
        description="Robust standard deviations of the last 16 batches by which a batch's reward may differ "
        "from their median, or its losses, gradient norm and update size be above it, before it is a fault; "
        "null: any.",
    )
    score: IndependentScore = IndependentScore()
    keep: Literal["final", "best"] = Field(
        "best",
        description="The weights that the stage hands on: the last ones (final), or those with the best "
        "independent score, if the last ones are far below it (best; without score.by the last ones).",
    )
    on_alarm: Literal["warn", "raise_kl", "roll_back", "stop"] = Field(
        "roll_back",
        description="After two faulty batches in a row (KL budget, text_alarm, spike_alarm), or two "
        "measurements with a score far below the best: say so at the end (warn), raise the weight of the KL "
        "penalty by half each time, to 17 times at most (raise_kl), return to the best weights and go on "
        "with twice the weight, three times at most and then stop (roll_back), or end with the best weights "
        "(stop). The best weights are those with the best score, or without score.by those of the last "
        "batch without a fault.",
    )

    @property
    def title(self) -> str:
        """Return the name of the method, such as RLOO or PPO-ptx."""
        return self.algorithm.upper() + ("-ptx" if self.ptx.is_on else "")

    @property
    def group_size(self) -> int:
        """Return the number of answers to each prompt."""
        return self.answers_per_prompt or (1 if self.algorithm == "ppo" else 4)

    @property
    def updates_per_step(self) -> int:
        """Return the mini-batches of a rollout batch, over all passes."""
        return self.epochs * -(-self.rollouts // self.minibatch)

    @property
    def num_updates(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self.steps * self.updates_per_step

    @model_validator(mode="after")
    def _check_guards(self) -> Self:
        budgets = (self.kl_budget, self.kl_budget_per_token)
        is_watched = any((*budgets, self.text_alarm, self.spike_alarm, self.score.by))
        if self.on_alarm in ("raise_kl", "stop") and not is_watched:
            raise ValueError(
                "on_alarm has nothing to act on: set text_alarm, kl_budget_per_token, spike_alarm or score.by"
            )
        if self.on_alarm == "raise_kl" and not self.kl_coefficient:
            raise ValueError("on_alarm=raise_kl multiplies kl_coefficient: set it above 0")
        return self

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
