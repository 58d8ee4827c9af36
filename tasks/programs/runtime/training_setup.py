"""How SFT, the reward model and DPO begin: what is trained, from which weights, by which plan; and what memory it takes."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tasks.config.models import Text
from tasks.config.stages import Dpo, Reward, Sft
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import schedules
from tasks.rlhf.batches import layout_checks, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.compute import distributed, free_memory
from tasks.rlhf.models import gradient_checkpointing, loading, trainable
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.rlhf.models.quantised import Precision
from tasks.rlhf.models.trainable import Trainable
from tasks.rlhf.training import dry_run, memory
from tasks.rlhf.training.loop import Plan, Training
from tasks.system import torchrun
from tasks.system.errors import InputError


def base(
    run: Run, source: str, precision: Precision | None, text: Text, device: torch.device
) -> PreTrainedModel:
    """The frozen model of the input ``source``, in the precision that is set, checked for the lengths of the texts. Raises InputError."""
    if precision is None and loading.folder_dtype(run.inputs[source]) == torch.float16:
        raise InputError(
            f"The {source} is stored in float16, in which small gradients vanish: set weights.* to bfloat16, or to float32."
        )
    model = loading.load(run.inputs[source], device=device, precision=precision)
    loading.check_head(model)
    loading.check_context(model, text.max_prompt_tokens + text.max_answer_tokens)
    if run.machine.gradient_checkpointing:
        gradient_checkpointing.enable(model)
    return model


def share_prompts(run: Run, base: PreTrainedModel, questions: list[Comparison], *, pad_id: int) -> None:
    """Compare answers that share their prompt with plain forward passes; a model that differs computes each alone.

    Raises InputError for a model whose texts depend on others even then.
    """
    measure = partial(layout_checks.sharing_gap, base, questions, pad_id=pad_id)
    gap, told = layout_checks.check_layout(base, measure, layout="Sharing a prompt among its answers")
    print(f"Shared prompts are {gap.nats:.2g} nats a token from plain forward passes.", flush=True)
    if told:
        run.warn(told)


class Step(NamedTuple):
    """The largest forward and backward of a stage: ``rows`` of ``tokens`` tokens."""

    rows: int
    tokens: int
    packed: bool = False  # documents side by side; else a question with its answers


def largest(questions: list[Comparison], batch_size: int, run: Run) -> Step:
    """A bound of what ``branches.join`` can make of some questions of the stage's input "model"."""
    per_rank = -(-batch_size // distributed.world())
    longest: dict[int, int] = {}  # by number of answers
    for c in questions:
        longest[len(c.answers)] = max(
            longest.get(len(c.answers), 0), len(c.prompt) + sum(map(len, c.answers))
        )
    hidden_size = loading.load_config(run.inputs["model"]).get_text_config().hidden_size
    widest, most = (
        shared_prompt.max_row_tokens([(c.prompt, c.answers) for c in questions], hidden_size=hidden_size),
        run.machine.micro_batch,
    )
    steps = []
    for answers, tokens in longest.items():
        together = min(per_rank, len(questions), max(1, most // answers) if most else per_rank)
        steps.append(Step(together * -(-tokens // widest), min(tokens, widest)))
    return max(steps, key=lambda step: step.rows * step.tokens)


def afford(
    settings: Sft | Reward | Dpo,
    run: Run,
    source: str,
    precision: Precision | None,
    device: torch.device,
    step: Step,
    *,
    members: int = 1,
) -> None:
    """Refuse to load what cannot be trained in the memory that is there, and say what would fit; bottlenecks and shards are not estimated."""
    stage = {Sft: "sft", Reward: "reward", Dpo: "dpo"}[type(settings)]
    if settings.tune == "bottleneck" or (distributed.world() > 1 and run.machine.of(stage).shard):
        return
    plan = dry_run.Plan(
        config=loading.load_config(run.inputs[source]),
        rows=step.rows,
        tokens=step.tokens,
        precision=precision,
        rank=settings.lora.rank if settings.tune == "lora" else None,
        targets=settings.lora.targets,
        dropout=settings.lora.dropout,
        num_adapters=members,
        checkpointing=run.machine.gradient_checkpointing,
        packed=step.packed,
        visible=not step.packed,
        device=device,
    )
    free = free_memory.available(device) // (torchrun.local_world() if device.type == "cpu" else 1)
    try:
        estimate = memory.estimate(plan)
        print(f"A step takes about {memory.told(estimate)}", flush=True)
        memory.check(estimate, free)
    # The model's own code runs on tensors without data there, which not every model's code can; a refusal is none of these.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        run.warn(
            f"How much memory a step of {stage} takes is not known: the estimate fails on {plan.config.model_type} models "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}). The stage starts all the same and may run out of memory."
        )
    else:
        if device.type == "cpu" and estimate.total > free:
            free_memory.map_large_tensors()
    distributed.barrier()  # before the first of those that share a memory begins to fill it


def tell_peak(device: torch.device) -> None:
    """Print what the estimate can be held against."""
    print(
        f"At most {memory.gigabytes(free_memory.peak(device))} were {'allocated' if device.type == 'cuda' else 'held'} at once.",
        flush=True,
    )


def tuning(
    settings: Sft | Reward | Dpo,
    base: PreTrainedModel | PeftModel,
    name: str,
    *,
    folder: Path,
    fingerprint: Fingerprint,
    shard: bool,
) -> Trainable:
    """What of ``base``, which came from ``folder``, is trained (torch's global seed), in parts on the ranks with ``shard``. Raises InputError."""
    if shard and settings.tune != "full":
        raise InputError(
            "Only weights that are all trained can be sharded (launch.*.shard): set tune to full, or shard to false."
        )
    match settings.tune:
        case "lora":
            chosen = trainable.attach_lora(base, name, fingerprint=fingerprint, **settings.lora.model_dump())
        case "full":
            assert isinstance(base, PreTrainedModel)
            if fingerprint.precision in ("int8", "nf4"):
                raise InputError(
                    f"Weights in {fingerprint.precision} cannot be trained themselves: train an adapter, or set weights.* to null."
                )
            chosen = trainable.unfreeze_all(base, folder, shard=shard)
        case "bottleneck":
            assert isinstance(base, PreTrainedModel)
            chosen = trainable.attach_bottlenecks(
                base, fingerprint=fingerprint, **settings.bottleneck.model_dump()
            )
    return chosen


def training(
    settings: Sft | Reward | Dpo, run: Run, tuning: Trainable, *, num_rows: int, seed: int
) -> Training:
    """The optimizer steps over ``num_rows`` rows, with the weights of the input "start" where there is one, or from the checkpoint."""
    if "start" in run.inputs:
        trainable.load_start(tuning.parameters, run.inputs["start"])
    plan = Plan(
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
    begun = Training(
        tuning.parameters,
        run.checkpoints,
        plan,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        apart=tuning.apart,
    )
    run.rewind(begun.start)
    return begun
