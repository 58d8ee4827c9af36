"""Check what `accelerate launch` asks of a program: some of it is set elsewhere, and nothing is ignored.

accelerate hands its settings on as environment variables. Ranks, nodes and GPUs are torchrun's variables,
which `tasks.system.torchrun` reads, and FSDP shards the weights as ``machine.launch.*.shard`` does.
"""

from collections.abc import Mapping, MutableMapping

from tasks.system.errors import InputError

SIGN = "ACCELERATE_MIXED_PRECISION"  # accelerate sets it in every process that it starts
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not used: set distributed_type to MULTI_GPU or FSDP.",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not used: set distributed_type to MULTI_GPU or FSDP.",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "its parallelism_config is not used: leave that out.",
    "FSDP_OFFLOAD_PARAMS": "offloading parameters is not supported: set fsdp_offload_params to false.",
    "FSDP_ACTIVATION_CHECKPOINTING": "set machine.gradient_checkpointing instead of "
    "fsdp_activation_checkpointing.",
}


def shards(environment: Mapping[str, str]) -> bool:
    """Return whether accelerate was asked to shard the weights."""
    return environment.get("ACCELERATE_USE_FSDP") == "true"


def check(environment: Mapping[str, str]) -> None:
    """Raise InputError if accelerate started no ranks, or was asked for what is set elsewhere."""
    if SIGN not in environment:
        return
    if "MASTER_ADDR" in environment and "RANK" not in environment:
        raise InputError(
            "`accelerate launch` was asked for several processes and started none that know of each other: "
            "set distributed_type to MULTI_GPU in its configuration, on machines without GPUs too."
        )
    if (precision := environment[SIGN]) != "no":
        raise InputError(
            f"`accelerate launch` was asked for mixed_precision={precision}, but the precision is that of "
            "weights.*: start it with --mixed_precision no."
        )
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "NO")).upper() != "NO":
        raise InputError(
            f"`accelerate launch` was asked for dynamo_backend={backend}, but programs are not compiled: "
            "start it with --dynamo_backend no."
        )
    for name, reason in REFUSED.items():
        if environment.get(name) == "true":
            raise InputError(f"`accelerate launch`: {reason}")


def load_on_every_rank(environment: MutableMapping[str, str]) -> None:
    """Let every rank load weights: asked for FSDP, transformers loads them on the first one only, and expects
    that accelerate sends them to the others.
    """
    if shards(environment):
        environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
