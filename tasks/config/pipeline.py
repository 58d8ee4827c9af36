"""Define the settings of a whole run, from which Prefect makes the form of a run in its pages.

The flow ``rlhf`` in flows/pipeline.py takes them as its parameter. How the form looks (titles, choices) is in
base.py; flows/commands/deploy.py fills in the values of a profile. The settings need pydantic only, so flows
and programs share them.

A stage's program gets a ``*Job``: the sections of ``Pipeline`` that its result depends on. Settings that do
not change a result (threads, device, micro-batch, steps between checkpoints) are in ``Machine``, never in a
key.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.machine import Machine, Pools
from tasks.config.rounds import Rounds
from tasks.config.sections.base import Settings
from tasks.config.sections.benchmarks import Benchmarks
from tasks.config.sections.data import Data
from tasks.config.sections.dpo import Dpo
from tasks.config.sections.gates import Promotion
from tasks.config.sections.judges import LanguageJudge, NoJudge
from tasks.config.sections.models import Base, BuiltinBase, Text, Weights
from tasks.config.sections.ppo import Ppo
from tasks.config.sections.reward import Reward
from tasks.config.sections.samples import Samples
from tasks.config.sections.sft import Merge, Sft
from tasks.config.sections.sources import ShellSite, Source
from tasks.config.sections.winrate import Winrate


class Pipeline(Settings):
    """From votes to an aligned model: the whole run."""

    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all random draws.")
    method: Literal["ppo", "dpo", "both"] = Field(
        "both", description="Which policies are trained and compared."
    )
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
    samples: Samples = Samples()
    winrate: Winrate = Winrate()
    judge: LanguageJudge = NoJudge()
    benchmarks: Benchmarks = Benchmarks()
    rounds: Rounds = Rounds()
    promotion: Promotion = Promotion()
    machine: Machine = Machine()
    pools: Pools = Pools()

    @model_validator(mode="after")
    def _check_precision_and_sharding(self) -> Self:
        weights = self.weights
        for name, stage, precision in (
            ("base", "sft", weights.base),
            ("merged", "reward", weights.merged),
            ("merged", "dpo", weights.merged),
        ):
            if precision in ("int8", "nf4") and getattr(self, stage).tune == "full":
                raise ValueError(
                    f"{stage}.tune=full trains every weight, which weights.{name}={precision} does not "
                    "allow: "
                    "train an adapter, or set it to null"
                )
        if (
            self.dpo.tune == "bottleneck"
            and self.dpo.bottleneck.whole_layers
            and (weights.merged not in (None, "float32") or self.merge.dtype)
        ):
            raise ValueError(
                "dpo.bottleneck.whole_layers trains in float32: set weights.merged to null or float32, "
                "and merge.dtype to null"
            )
        for stage in ("sft", "reward", "dpo"):
            if self.machine.of(stage).shard and getattr(self, stage).tune == "bottleneck":
                raise ValueError(
                    f"machine.launch.{stage}.shard is for {stage}.tune=full or lora: bottlenecks need whole "
                    "layers"
                )
        if self.machine.of("ppo").shard and self.ppo.sampler != "plain":
            raise ValueError(
                f"machine.launch.ppo.shard: ppo.sampler={self.ppo.sampler} needs all weights of the base in "
                "every process; set it to plain"
            )
        return self

    @model_validator(mode="after")
    def _check_independent_score(self) -> Self:
        if self.method == "dpo":
            return self
        if self.ppo.score.by == "held_out" and not self.reward.held_out_member:
            raise ValueError(
                "ppo.score.by=held_out needs a reward model that PPO never sees: set "
                "reward.held_out_member to true, or ppo.score.by to null"
            )
        if self.ppo.score.by == "gold" and not isinstance(self.source, ShellSite):
            raise ValueError(
                "ppo.score.by=gold knows the answers of the built-in site only: set it to held_out or null"
            )
        if self.ppo.score.by == "judge" and isinstance(self.judge, NoJudge):
            raise ValueError(
                "ppo.score.by=judge needs a language model that judges: set judge.kind to local or endpoint, "
                "or ppo.score.by to null"
            )
        return self

    def check_rounds(self) -> None:
        """Raise ValueError if the flow ``rounds`` cannot run with these settings; the chain alone can."""
        rounds = self.rounds
        if self.method == "dpo":
            raise ValueError("rounds train the policy with PPO: set method to ppo")
        if rounds.choose.by == "disagreement" and self.reward.members < 2:
            raise ValueError(
                "rounds.choose.by=disagreement needs an ensemble: set reward.members to 4, or "
                "rounds.choose.by to random"
            )
        self._check_labels_of_rounds()
        self._check_training_in_rounds()

    def _check_labels_of_rounds(self) -> None:
        rounds, labels = self.rounds, self.rounds.labels
        if labels.kind == "gold" and not isinstance(self.source, ShellSite):
            raise ValueError(
                "rounds.labels.kind=gold knows the answers of the built-in site only: set it to judge, file "
                "or people"
            )
        if labels.kind == "judge" and labels.by == "lm" and isinstance(self.judge, NoJudge):
            raise ValueError(
                "rounds.labels.by=lm needs a language model that judges: set judge.kind to local or endpoint"
            )
        if labels.kind == "judge" and labels.by == "held_out" and not self.reward.held_out_member:
            raise ValueError(
                "rounds.labels.by=held_out needs a reward model that PPO never sees: set "
                "reward.held_out_member to true"
            )
        if (
            labels.kind == "judge"
            and labels.by == "held_out"
            and rounds.start == "sft"
            and not rounds.old_share
        ):
            raise ValueError(
                "rounds.labels.by=held_out needs a reward model before the first round: set rounds.start to "
                "policy, or rounds.old_share above 0"
            )

    def _check_training_in_rounds(self) -> None:
        if self.reward.comparisons == "rankings":
            raise ValueError("rounds ask about pairs: set reward.comparisons to pairs")
        if self.reward.start:
            raise ValueError("rounds train the reward model anew on all comparisons: set reward.start to ''")
        if self.machine.of("ppo").shard and self.rounds.continue_policy:
            raise ValueError(
                "rounds.continue_policy reads the last policy's adapter whole: set machine.launch.ppo.shard "
                "to false, or rounds.continue_policy to false"
            )
