"""Define the settings that say where and how a stage runs. They are never part of an artifact's key."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.sections.base import Settings


class Launch(Settings):
    """How a training stage is started.

    With any number of processes a step is the same to rounding; over many steps rounding adds up.
    """

    processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes on each node, each on its own GPU if there are GPUs; they share a step's "
        "batch.",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=4096,
        description="Nodes; the same torchrun command is started by hand on each of the others "
        "(docs/operations.md).",
    )
    accelerate_config: str = Field(
        "",
        description="Path of a configuration of accelerate where the stage runs: the stage is started by "
        "`accelerate launch`, whose configuration says how many processes, nodes and GPUs, and whether to "
        "shard; its precision is not used. Empty: torchrun, if there is more than one process.",
    )
    shard: bool = Field(
        False,
        description="Split weights over the processes (FSDP): with tune=full those that are trained, with "
        "their gradients and optimizer moments; with adapters the frozen base, quantised or not.",
    )

    @property
    def is_distributed(self) -> bool:
        """Return whether a launcher starts the stage's processes."""
        return self.processes * self.nodes > 1 or bool(self.accelerate_config)

    @model_validator(mode="after")
    def _check_accelerate(self) -> Self:
        if self.accelerate_config and self.processes * self.nodes > 1:
            raise ValueError(
                "launch.*.accelerate_config says how many processes and nodes there are: leave processes and "
                "nodes at 1"
            )
        return self


class Launches(Settings):
    """How each stage is started that can run as several processes."""

    sft: Launch = Launch()
    reward: Launch = Launch()
    dpo: Launch = Launch()
    ppo: Launch = Launch()


class Machine(Settings):
    """Settings that change a step by rounding only (micro-batches also change SFT's dropout masks).

    PPO and winrate sample, and rounding changes a sampled token now and then. So runs on other machines or
    with another number of threads differ after some steps, by as much as two random draws of the same run.
    """

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device that programs compute on; auto: a GPU if there is one."
    )
    threads: int = Field(0, ge=0, description="CPU threads per program; 0: one per core.")
    dask: str = Field(
        "",
        description="Address of a Dask scheduler whose workers run parts of the data stage "
        "(tcp://host:8786); empty: this machine.",
    )
    ray: str = Field(
        "",
        description="Address of a Ray cluster that this machine belongs to (host:6379, or auto), whose "
        "workers run parts of the data stage; empty: this machine.",
    )
    attention: Literal["sdpa", "flash_attention_2", "flex_attention"] = Field(
        "sdpa",
        description="Kernels of SFT, reward model and DPO. For packed documents sdpa takes a mask with a "
        "number for each two tokens; flash_attention_2 (package flash-attn, weights in bfloat16) and "
        "flex_attention (compiled by torch) do not. Both need a GPU.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the layers' inputs for the backward pass, and compute the rest again in it.",
    )
    micro_batch: int = Field(
        0, ge=0, description="Rows per forward and backward pass; 0: the whole batch of an optimizer step."
    )
    checkpoint_steps: int = Field(
        50, ge=1, description="Optimizer steps between checkpoints; for PPO a tenth as many rollout batches."
    )
    time_limit: int = Field(
        0,
        ge=0,
        description="Seconds after which a program that trains ends with a checkpoint, from which the same "
        "command goes on; 0: none. In a job of Slurm it also ends before the job's own limit.",
    )
    upload_seconds: int = Field(
        300,
        ge=0,
        description="Seconds between uploads of a dispatched stage's newest checkpoint, so that another "
        "machine can resume from it; 0: none.",
    )
    system_metrics: bool = Field(
        True,
        description="Log the machine's load (processor, memory, disk, network, GPU) to MLflow while a stage "
        "runs, every 10 seconds.",
    )
    launch: Launches = Launches()
    rendezvous: str = Field(
        "",
        description="Address at which the nodes of a stage find each other, as host:port of one of them; "
        "empty: one node.",
    )

    @model_validator(mode="after")
    def _check_rendezvous(self) -> Self:
        if not self.rendezvous and any(self.of(stage).nodes > 1 for stage in Launches.model_fields):
            raise ValueError("launch.*.nodes above 1 needs rendezvous, as host:port of one of the nodes")
        return self

    @model_validator(mode="after")
    def _check_clusters(self) -> Self:
        if self.dask and self.ray:
            raise ValueError("dask and ray are two clusters for the same work: set one of them")
        return self

    def of(self, stage: str) -> Launch:
        """Return how ``stage`` is started."""
        found = getattr(self.launch, stage, None)
        return found if isinstance(found, Launch) else Launch()


class Pools(Settings):
    """The work pools whose workers run the stages; empty: the process that runs the flow."""

    cpu: str = Field("", pattern=r"^[\w.-]*$", description="Work pool of site, data and report.")
    gpu: str = Field("", pattern=r"^[\w.-]*$", description="Work pool of the stages that train or sample.")
