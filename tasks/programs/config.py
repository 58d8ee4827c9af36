"""Every knob of every stage: pydantic only, so that a Prefect process, the CLI and a program all read the same types.

A stage's program gets a ``*Job``: the sections of ``Pipeline`` that its result depends on. What does not change a result (threads, device,
micro-batch, checkpoint cadence) is in ``Machine`` and never part of an artifact's key.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tasks.programs.settings import Settings as Settings
from tasks.programs.settings import as_choice
from tasks.programs.source import DUMPS as DUMPS
from tasks.programs.source import HhRlhf as HhRlhf
from tasks.programs.source import HubSource as HubSource
from tasks.programs.source import ShellSite as ShellSite
from tasks.programs.source import Source as Source
from tasks.programs.source import StackExchangeDump as StackExchangeDump
from tasks.programs.tuning import Dpo as Dpo
from tasks.programs.tuning import Lora as Lora
from tasks.programs.tuning import Merge as Merge
from tasks.programs.tuning import Reward as Reward
from tasks.programs.tuning import Sft as Sft
from tasks.programs.tuning import Tuning as Tuning
from tasks.rlhf.refusal import InputError as InputError

# ---------------------------------------------------------------------------------------------------------------- data


class Data(Settings):
    """Scoring, pairing and splitting."""

    max_pairs: int = Field(10, ge=1, le=1000, description="Most comparison pairs kept per question.")
    min_answer_chars: int = Field(1, ge=1, description="Shorter answers (characters of Markdown) are dropped and counted.")
    max_answer_chars: int = Field(20_000, ge=1, description="Longer answers (characters of Markdown) are dropped and counted.")
    max_prompt_chars: int = Field(20_000, ge=1, description="Longer questions (characters of Markdown) are dropped and counted.")
    personal: Literal["mask", "drop", "keep"] = Field(
        "mask", description="E-mail addresses, phone numbers and secret keys: replaced by their kind, or texts that have them dropped, or kept."
    )
    languages: tuple[str, ...] = Field((), description="Languages (ISO 639-1, such as en) whose questions are kept; empty: any.")
    max_questions_per_author: int | None = Field(None, ge=1, description="Most questions of one author (InstructGPT: 200 prompts); null: any number.")
    duplicates: Literal["together", "drop"] = Field(
        "together", description="Questions that say the same (see alike) are kept in one split, or only the first of them is kept at all."
    )
    against: tuple[str, ...] = Field(
        (), description="Files of evaluation sets used later; questions that share 13 words in a row with one of them are dropped."
    )
    alike: float = Field(
        0.8, gt=0, le=1, description="Prompts that share this much (Jaccard index of three-word runs) are never in two splits; 1: equal words only."
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="Most rows that may be unreadable; with more, the stage fails.")
    finetune_share: float = Field(0.34, ge=0, le=1, description="Share of the questions for fine-tuning (and pretraining of the built-in base).")
    reward_share: float = Field(0.43, ge=0, le=1, description="Share of the questions for reward modelling and DPO.")
    rl_share: float = Field(0.10, ge=0, le=1, description="Share of the questions whose prompts PPO answers; the rest is for evaluation.")

    @model_validator(mode="after")
    def _room_for_evaluation(self) -> Self:
        if self.finetune_share + self.reward_share + self.rl_share >= 1:
            raise ValueError("finetune_share + reward_share + rl_share must stay below 1: the rest is the evaluation split")
        return self


# ------------------------------------------------------------------------------------------------------------------ models and text


class BuiltinBase(Settings):
    """A small Llama trained from scratch, with its own byte-level BPE tokenizer, on the fine-tuning split's text."""

    kind: Literal["builtin"] = "builtin"
    vocabulary: int = Field(1024, ge=300, le=65_536, description="Tokens of the byte-level BPE tokenizer, special ones included.")
    hidden_size: int = Field(128, ge=16, le=4096, description="Width of the residual stream.")
    num_layers: int = Field(3, ge=1, le=64, description="Transformer layers.")
    num_heads: int = Field(4, ge=1, le=64, description="Attention heads; must divide the hidden size.")
    context: int = Field(192, ge=32, le=8192, description="Context length in tokens.")
    loss_on: Literal["answer", "all"] = Field("answer", description="Tokens the loss counts: the answers', or all.")
    steps: int = Field(560, ge=1, description="Optimizer steps.")
    batch_size: int = Field(5, ge=1, description="Blocks of one context length per optimizer step.")
    learning_rate: float = Field(5e-3, gt=0, le=1, description="Peak learning rate of Muon (matrices) and AdamW (embeddings and norms).")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError("num_heads must divide hidden_size into even head widths")
        return self


class HuggingFaceBase(Settings):
    """A causal language model in Hugging Face format (safetensors; no remote code)."""

    kind: Literal["hugging-face"] = "hugging-face"
    path: str = Field(min_length=1, description="A model folder, or a hub id.")
    revision: str | None = Field(None, description="Commit, branch or tag of the hub id; null for a folder.")


Base = Annotated[BuiltinBase | HuggingFaceBase, Field(discriminator="kind", json_schema_extra=as_choice)]


class Text(Settings):
    """How a question and an answer become tokens, the same in every stage."""

    template: Literal["question-answer", "human-assistant", "chat"] = Field(
        "question-answer", description="'Question: ... Answer: ...', 'Human: ... Assistant: ...' (hh-rlhf), or the tokenizer's chat template."
    )
    max_prompt_tokens: int = Field(48, ge=8, le=131_072, description="Longer prompts lose text from the end of the question.")
    max_answer_tokens: int = Field(56, ge=1, le=131_072, description="Longest answer, its end token included; PPO samples at most as many.")


# ------------------------------------------------------------------------------------------------------------------------- stages


class Ppo(Settings):
    """Proximal policy optimisation with a KL penalty towards the SFT model."""

    lora: Lora = Lora(rank=16, alpha=32)
    steps: int = Field(24, ge=1, description="Rollout batches.")
    rollouts: int = Field(64, ge=2, description="Answers sampled per rollout batch.")
    epochs: int = Field(2, ge=1, le=100, description="Passes over each rollout batch, each in a fresh order.")
    minibatch: int = Field(32, ge=1, description="Rollouts per optimizer step.")
    learning_rate: float = Field(1.5e-3, gt=0, le=1, description="Adam learning rate of policy and critic, linear to 0.")
    kl_coefficient: float = Field(0.05, ge=0, description="Weight of the KL penalty (the initial one when it adapts).")
    kl_target: float | None = Field(None, gt=0, description="Nats per response the adaptive KL controller aims at; null keeps the weight fixed.")
    kl_horizon: int = Field(10_000, ge=1, description="Rollouts over which the adaptive controller corrects.")
    discount: float = Field(1.0, gt=0, le=1, description="Gamma of GAE.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="Lambda of GAE.")
    clip_range: float = Field(0.2, gt=0, lt=1, description="Clip range of the probability ratio.")
    dual_clip: float | None = Field(3.0, gt=1, description="Bound of the loss for negative advantages; null for none.")
    value_clip_range: float = Field(0.2, gt=0, description="Clip range of the value update.")
    value_weight: float = Field(0.1, ge=0, description="Weight of the value loss.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norms of policy and critic are clipped to this.")
    max_step_kl: float | None = Field(
        1.0, gt=0, description="Skip an optimizer step whose approximate KL from the sampler (nats a token) is above; null: never."
    )
    temperature: float = Field(1.0, gt=0, le=10, description="Divides the logits in sampling and scoring alike.")
    accept_fooled: bool = Field(True, description="Whether to train against a reward model that attacks have fooled; false stops with a sentence.")
    missing_eos_reward: float = Field(-3.0, description="Replaces the normalised score of a response without an end token.")

    @model_validator(mode="after")
    def _no_dropout(self) -> Self:
        if self.lora.dropout:
            raise ValueError("lora.dropout must be 0: with dropout the first ratio is not 1")
        return self


Precision = Literal["float32", "bfloat16", "int8", "nf4"]


class Weights(Settings):
    """The precision of frozen weights; int8 and nf4 (bitsandbytes) hold the matrices of the layers, and only adapters can be trained on them."""

    base: Precision | None = Field(None, description="Of the base in SFT; null: as it is stored.")
    merged: Precision | None = Field(None, description="Of the merged model, after it; null: as it is stored. nf4 after nf4 rounds twice.")


class Winrate(Settings):
    """Comparison of the trained policies on held-out questions."""

    num_questions: int = Field(500, ge=1, description="Held-out questions answered by every policy (at most what the split has).")
    temperature: float = Field(0.7, gt=0, le=10, description="Sampling temperature of every policy.")
    batch_size: int = Field(200, ge=1, description="Questions answered at a time; part of the result, because padding moves the last digits.")


class Launch(Settings):
    """How a training stage is started. Each step of any number of processes is the same to rounding; over many steps rounding adds up."""

    processes: int = Field(1, ge=1, le=1024, description="Processes on each node, on a GPU each where there are GPUs; they share a step's batch.")
    nodes: int = Field(1, ge=1, le=4096, description="Nodes; on each but this one the same torchrun command is started by hand (docs/operations.md).")
    shard: bool = Field(False, description="With tune=full, keep weights, gradients and optimizer moments in parts on the processes (FSDP).")


class Launches(Settings):
    """How the stages are started that can run as several processes."""

    sft: Launch = Launch()
    reward: Launch = Launch()
    dpo: Launch = Launch()


class Machine(Settings):
    """What changes a step only by rounding (and, with micro-batches, SFT's dropout masks): never part of a key.

    PPO and winrate sample: there rounding turns a token now and then, so runs on other machines or numbers of threads part
    after some steps, as two draws of one run do.
    """

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where programs compute.")
    threads: int = Field(0, ge=0, description="CPU threads per program; 0 takes every core.")
    dask: str = Field("", description="Address of a Dask scheduler whose workers do the data stage's shards (tcp://host:8786); empty: this machine.")
    gradient_checkpointing: bool = Field(False, description="Keep the layers' inputs only for the backward pass, and compute the rest again in it.")
    micro_batch: int = Field(0, ge=0, description="Rows per forward and backward; 0 takes the optimizer step's batch whole.")
    checkpoint_steps: int = Field(50, ge=1, description="Optimizer steps between checkpoints; for PPO a tenth as many rollout batches.")
    upload_seconds: int = Field(
        300, ge=0, description="Seconds between uploads of a dispatched stage's newest checkpoint, for another machine to go on from; 0: none."
    )
    launch: Launches = Launches()
    rendezvous: str = Field("", description="Where the nodes of a stage meet, as host:port; the host is one of them. Empty: there is one node.")

    @model_validator(mode="after")
    def _nodes_meet(self) -> Self:
        if not self.rendezvous and any(self.of(stage).nodes > 1 for stage in Launches.model_fields):
            raise ValueError("launch.*.nodes above 1 needs rendezvous, as host:port of one of the nodes")
        return self

    def of(self, stage: str) -> Launch:
        """How ``stage`` is started."""
        found = getattr(self.launch, stage, None)
        return found if isinstance(found, Launch) else Launch()


class Pools(Settings):
    """Which work pool's workers run a stage; empty: the process that runs the flow. Never part of a key."""

    cpu: str = Field("", pattern=r"^[\w.-]*$", description="Pool of site, data and report.")
    gpu: str = Field("", pattern=r"^[\w.-]*$", description="Pool of the stages that train or sample.")


# ----------------------------------------------------------------------------------------------------------------------- pipeline


class Pipeline(Settings):
    """From votes to an aligned model: the whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn.")
    method: Literal["ppo", "dpo", "both"] = Field("both", description="Which policies are trained and compared.")
    source: Source = ShellSite()
    data: Data = Data()
    base: Base = BuiltinBase()
    text: Text = Text()
    weights: Weights = Weights()
    sft: Sft = Sft()
    merge: Merge = Merge()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    dpo: Dpo = Dpo()
    winrate: Winrate = Winrate()
    machine: Machine = Machine()
    pools: Pools = Pools()

    @model_validator(mode="after")
    def _quantised_weights_stay_as_they_are(self) -> Self:
        weights = self.weights
        for name, stage, precision in (("base", "sft", weights.base), ("merged", "reward", weights.merged), ("merged", "dpo", weights.merged)):
            if precision in ("int8", "nf4") and getattr(self, stage).tune == "full":
                told = f"{stage}.tune=full trains every weight, which weights.{name}={precision} does not allow"
                raise ValueError(f"{told}: train an adapter, or set it to null")
        if self.dpo.tune == "bottleneck" and self.dpo.bottleneck.whole_layers and (weights.merged not in (None, "float32") or self.merge.dtype):
            raise ValueError("dpo.bottleneck.whole_layers trains in float32: set weights.merged to null or float32, and merge.dtype to null")
        for stage in ("sft", "reward", "dpo"):
            if self.machine.of(stage).shard and getattr(self, stage).tune != "full":
                raise ValueError(f"machine.launch.{stage}.shard is for {stage}.tune=full: an adapter is small, and every process holds it")
        return self


class Job(Settings):
    """The sections of a pipeline that one stage's result depends on."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> Self:
        return cls(**{name: getattr(pipeline, name) for name in cls.model_fields})


class SiteJob(Job):
    seed: int
    source: ShellSite


class DataJob(Job):
    seed: int
    source: Source
    data: Data


class PretrainJob(Job):
    seed: int
    base: BuiltinBase


class SftJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    sft: Sft


class MergeJob(Job):
    text: Text = Text()
    weights: Weights = Weights()
    merge: Merge


class RewardJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    reward: Reward


class ReferenceJob(Job):
    text: Text
    weights: Weights = Weights()


class PpoJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    ppo: Ppo


class DpoJob(Job):
    seed: int
    text: Text
    weights: Weights = Weights()
    dpo: Dpo


class WinrateJob(Job):
    seed: int
    source: Source
    text: Text
    weights: Weights = Weights()
    winrate: Winrate


class ReportJob(Job):
    pass
