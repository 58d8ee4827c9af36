"""Check what `accelerate launch` asks of a program: what is set elsewhere, or not done, is refused.

accelerate hands its settings on as environment variables. Ranks, nodes and GPUs are torchrun's variables,
which `tasks.system.torchrun` reads, and FSDP shards the weights as ``machine.launch.*.shard`` does. How it
wraps, prefetches and stores them changes no result, and is not read.
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
    _check_sharding(environment)


def _check_sharding(environment: Mapping[str, str]) -> None:
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if strategy.upper() not in ("FULL_SHARD", "1"):
        raise InputError(
            f"`accelerate launch` was asked for fsdp_sharding_strategy={strategy}, but weights, gradients "
            "and moments are sharded over all ranks: set it to FULL_SHARD."
        )
    if environment.get("FSDP_RESHARD_AFTER_FORWARD") == "false":
        raise InputError(
            "`accelerate launch` was asked to keep gathered weights after the forward pass, but they are "
            "given back: set fsdp_reshard_after_forward to true."
        )
    if ignored := environment.get("FSDP_IGNORED_MODULES"):
        raise InputError(
            f"`accelerate launch` was asked for fsdp_ignored_modules={ignored}, but every module is sharded: "
            "leave that out."
        )


def check_device(environment: Mapping[str, str], device: str) -> None:
    """Raise InputError if accelerate was asked for the CPU and the program computes on another device."""
    wants_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if SIGN in environment and wants_cpu and device != "cpu":
        raise InputError(
            f"`accelerate launch` was asked for use_cpu: true, but the device is {device}: set "
            "machine.device=cpu."
        )


def load_on_every_rank(environment: MutableMapping[str, str]) -> None:
    """Let every rank load weights: asked for FSDP, transformers loads them on the first one only, and expects
    that accelerate sends them to the others.
    """
    if shards(environment):
        environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
