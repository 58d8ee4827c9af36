"""Settings that say where and how a stage runs. They are never part of an artifact's key."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.base import Settings


class Launch(Settings):
    """How a training stage is started. Each step of any number of processes is the same to rounding; over many steps rounding adds up."""

    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes on each node, on a GPU each where there are GPUs; they share a step's batch.",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=4096,
        description="Nodes; on each but this one the same torchrun command is started by hand (docs/operations.md).",
    )
    shard: bool = Field(
        False,
        description="With tune=full, keep weights, gradients and optimizer moments in parts on the processes (FSDP).",
    )


class Launches(Settings):
    """How the stages are started that can run as several processes."""

    sft: Launch = Launch()
    reward: Launch = Launch()
    dpo: Launch = Launch()


class Machine(Settings):
    """What changes a step only by rounding (and, with micro-batches, SFT's dropout masks): never part of a key.

    PPO and winrate sample: there rounding changes a token now and then, so runs on other machines or with other numbers of threads part
    after some steps, as far as two draws of the same run are apart.
    """

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where programs compute.")
    threads: int = Field(0, ge=0, description="CPU threads per program; 0 takes every core.")
    dask: str = Field(
        "",
        description="Address of a Dask scheduler whose workers do the data stage's shards (tcp://host:8786); empty: this machine.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep the layers' inputs only for the backward pass, and compute the rest again in it.",
    )
    micro_batch: int = Field(
        0, ge=0, description="Rows per forward and backward; 0 takes the optimizer step's batch whole."
    )
    checkpoint_steps: int = Field(
        50, ge=1, description="Optimizer steps between checkpoints; for PPO a tenth as many rollout batches."
    )
    upload_seconds: int = Field(
        300,
        ge=0,
        description="Seconds between uploads of a dispatched stage's newest checkpoint, for another machine to go on from; 0: none.",
    )
    launch: Launches = Launches()
    rendezvous: str = Field(
        "",
        description="Where the nodes of a stage meet, as host:port; the host is one of them. Empty: there is one node.",
    )

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
