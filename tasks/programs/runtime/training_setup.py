"""Prepare the training of SFT, the reward model and DPO.

Load the base, check memory, choose what is trained, start the optimizer.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.config.sections.dpo import Dpo
from tasks.config.sections.models import Text
from tasks.config.sections.reward import Reward
from tasks.config.sections.sft import Sft
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.batches import layout_checks, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.compute import accelerate_launch, distributed, free_memory, fsdp
from tasks.rlhf.models import architecture_checks, gradient_checkpointing, loading, quantised, trainable
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.rlhf.models.quantised import Precision
from tasks.rlhf.models.structure import load_on_first
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import dry_run, memory
from tasks.rlhf.training.loop import Schedule, Training
from tasks.system import torchrun
from tasks.system.errors import InputError


def is_sharded(run: Run, stage: str) -> bool:
    """Return whether several processes share the weights of ``stage``."""
    return wants_shards(run, stage) and distributed.world() > 1


def wants_shards(run: Run, stage: str) -> bool:
    """Return whether the weights of ``stage`` are sharded if it has several processes."""
    return run.machine.of(stage).shard or accelerate_launch.shards(os.environ)


def load_base(
    run: Run,
    source: str,
    precision: Precision | None,
    text: Text,
    device: torch.device,
    *,
    on_cpu: bool = False,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Return the frozen model of the input ``source`` in the precision that is set.

    With ``on_cpu`` it still is in the computer's memory, to be split before it is moved to ``device``.
    ``attention`` is transformers' name of its kernels.

    Raises InputError if it is stored in float16, has no output head or is too short for the texts.
    """
    if precision is None and loading.folder_dtype(run.inputs[source]) == torch.float16:
        raise InputError(
            f"The {source} is stored in float16, in which small gradients vanish: "
            "set weights.* to bfloat16, or to float32."
        )
    model = loading.load(
        run.inputs[source], device=device, precision=precision, on_cpu=on_cpu, attention=attention
    )
    architecture_checks.check_head(model)
    architecture_checks.check_context(model, text.max_prompt_tokens + text.max_answer_tokens)
    if run.machine.gradient_checkpointing:
        gradient_checkpointing.enable(model)
    return model


def load_trained_base(
    settings: Sft | Reward | Dpo,
    run: Run,
    source: str,
    precision: Precision | None,
    text: Text,
    device: torch.device,
) -> PreTrainedModel:
    """Return the model of the input ``source`` that the stage trains, or trains adapters of.

    It is already spread over the ranks if ``launch.*.shard`` says so; then only the first one reads it.
    Raises InputError as `load_base` does, and if precision or sharding do not allow what is trained.
    """
    if wants_shards(run, stage_name(settings)) and settings.tune == "bottleneck":
        raise InputError(
            "Bottlenecks need whole layers in every process (launch.*.shard): set tune to lora or full, or "
            "shard to false."
        )
    if settings.tune == "full" and precision in ("int8", "nf4"):
        raise InputError(
            f"Weights in {precision} cannot be trained themselves: train an adapter, or set "
            "weights.* to null."
        )
    attention = run.machine.attention
    check_attention(attention, device, precision or loading.folder_dtype(run.inputs[source]))
    load = partial(load_base, run, source, precision, text, device, attention=attention)
    if not is_sharded(run, stage_name(settings)):
        return load()
    return load_sharded(load, device, is_trained=settings.tune == "full")


def load_sharded(
    load: Callable[..., PreTrainedModel], device: torch.device, *, is_trained: bool = False
) -> PreTrainedModel:
    """Return what ``load(on_cpu=True)`` returns on the first rank, spread over the ranks.

    If it ``is_trained`` its weights are float32, and computed with in the type that they had.
    """
    base = load_on_first(partial(load, on_cpu=True), device)
    if is_trained:
        return trainable.shard_trained(base, device)
    with quantised.kept_attributes(base):
        fsdp.shard(base, device)
    return base


def check_attention(attention: str, device: torch.device, precision: Precision | torch.dtype) -> None:
    """Raise InputError if these kernels cannot compute on the device or in the precision."""
    if attention == "sdpa":
        return
    if device.type != "cuda":
        raise InputError(f"machine.attention={attention} needs a GPU: set it to sdpa.")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "machine.attention=flash_attention_2 needs flash-attn: pip install flash-attn, or set it to "
            "flex_attention or sdpa."
        )
    if attention == "flash_attention_2" and precision in ("float32", torch.float32):
        raise InputError(
            "machine.attention=flash_attention_2 computes in half precision: set weights.* to bfloat16, or "
            "machine.attention to flex_attention or sdpa."
        )


def check_prompt_sharing(run: Run, base: PreTrainedModel, *parts: Sequence[Comparison], pad_id: int) -> None:
    """Compare answers that share their prompt with plain forward passes.

    A model that differs computes each answer alone.

    Raises InputError for a model whose texts depend on others even then.
    """
    hardest = layout_checks.hardest_questions(chain(*parts))
    measure = partial(fsdp.with_full_weights, base, layout_checks.sharing_gap, hardest, pad_id=pad_id)
    gap, warning = layout_checks.check_layout(base, measure, layout="Sharing a prompt among its answers")
    print(f"Shared prompts are {gap.nats:.2g} nats a token from plain forward passes.", flush=True)
    if warning:
        run.warn(warning)


class MicroBatch(NamedTuple):
    """The largest forward and backward pass of a stage: ``rows`` of ``tokens`` tokens."""

    rows: int
    tokens: int
    packed: bool = False  # documents side by side, or else a question with its answers


def largest_micro_batch(questions: Sequence[Comparison], batch_size: int, run: Run) -> MicroBatch:
    """Return an upper bound of what ``shared_prompt.join`` makes of some questions for the stage's input
    "model".
    """
    per_rank = min(-(-batch_size // distributed.world()), len(questions))
    longest: dict[int, int] = {}  # tokens of a question with all its answers, by number of answers
    for question in questions:
        tokens = len(question.prompt) + sum(map(len, question.answers))
        longest[len(question.answers)] = max(longest.get(len(question.answers), 0), tokens)
    hidden_size = loading.load_config(run.inputs["model"]).get_text_config().hidden_size
    texts = ((question.prompt, question.answers) for question in questions)
    width = shared_prompt.max_row_tokens(texts, hidden_size=hidden_size)
    limit = run.machine.micro_batch  # answers at a time; 0 is all
    bounds = []
    for num_answers, tokens in longest.items():
        together = min(per_rank, max(1, limit // num_answers)) if limit else per_rank
        bounds.append(MicroBatch(together * -(-tokens // width), min(tokens, width)))
    return max(bounds, key=lambda bound: bound.rows * bound.tokens)


def check_memory(
    settings: Sft | Reward | Dpo,
    run: Run,
    source: str,
    precision: Precision | None,
    device: torch.device,
    micro_batch: MicroBatch,
    *,
    members: int = 1,
) -> None:
    """Estimate the memory of a training step before the input ``source`` is loaded; bottlenecks and shards
    are not estimated.

    Raises InputError, with the first change that makes it fit, if the step needs more than is free.
    """
    stage = stage_name(settings)
    if settings.tune == "bottleneck" or is_sharded(run, stage):
        return
    step = dry_run.StepSpec(
        config=loading.load_config(run.inputs[source]),
        rows=micro_batch.rows,
        tokens=micro_batch.tokens,
        precision=precision,
        rank=settings.lora.rank if settings.tune == "lora" else None,
        targets=settings.lora.targets,
        dropout=settings.lora.dropout,
        num_adapters=members,
        checkpointing=run.machine.gradient_checkpointing,
        packed=micro_batch.packed,
        explicit_mask=not micro_batch.packed,
        device=device,
    )
    free = free_memory.available(device) // (torchrun.local_world() if device.type == "cpu" else 1)
    try:
        estimate = memory.estimate(step)
        print(f"A step takes about {memory.format_estimate(estimate)}", flush=True)
        memory.check_fits(estimate, free)
    # The model's own code runs on tensors without data, which fails for some. InputError is none of these.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        run.warn(
            f"How much memory a step of {stage} takes is not known: the estimate fails on "
            f"{step.config.model_type} models "
            f"({type(error).__name__}: {first_line}). The stage starts all the same and may run out of "
            "memory."
        )
    else:
        if device.type == "cpu" and estimate.total > free:
            free_memory.map_large_tensors()
    distributed.barrier()  # ranks on one machine measure its free memory before any of them loads a model


def stage_name(settings: Sft | Reward | Dpo) -> str:
    """Return the stage that has these settings."""
    return {Sft: "sft", Reward: "reward", Dpo: "dpo"}[type(settings)]


def print_peak_memory(device: torch.device) -> None:
    """Print the largest memory use so far, for comparison with the estimate."""
    verb = "allocated" if device.type == "cuda" else "held"
    print(f"At most {memory.format_bytes(free_memory.peak(device))} were {verb} at once.", flush=True)


def build_trainable(
    settings: Sft | Reward | Dpo,
    base: PreTrainedModel | PeftModel,
    name: str,
    *,
    folder: Path,
    fingerprint: Fingerprint,
) -> Trainable:
    """Make the part of ``base``, loaded from ``folder``, that is trained: an adapter called ``name``,
    bottlenecks or all weights.

    New weights are drawn from torch's global generator.
    """
    match settings.tune:
        case "lora":
            return trainable.attach_lora(base, name, fingerprint=fingerprint, **settings.lora.model_dump())
        case "full":
            assert isinstance(base, PreTrainedModel)
            return trainable.unfreeze_all(base, folder)
        case "bottleneck":
            assert isinstance(base, PreTrainedModel)
            return trainable.attach_bottlenecks(
                base, fingerprint=fingerprint, **settings.bottleneck.model_dump()
            )


def start_training(
    settings: Sft | Reward | Dpo, run: Run, tuned: Trainable, *, num_rows: int, seed: int
) -> Training:
    """Prepare the optimizer steps over ``num_rows`` rows: from the newest checkpoint, the weights of the
    input "start", or fresh ones.
    """
    if "start" in run.inputs:
        trainable.load_start(tuned.parameters, run.inputs["start"])
    schedule = Schedule(
        total=schedules.num_steps(
            num_rows, batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps
        ),
        seed=seed,
        peak=settings.learning_rate,
        shape=settings.schedule,
        warmup_share=settings.warmup_share,
        evaluations=settings.evaluations,
        patience=settings.patience,
        keep_best=settings.keep == "best",
    )
    training = Training(
        tuned.parameters,
        run.checkpoints,
        schedule,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        clip_groups=tuned.clipped_separately,
    )
    run.rewind(training.start)
    return training
