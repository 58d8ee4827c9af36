"""How much memory a training step will take at its peak, told before anything is loaded.

Weights, gradients and optimizer states are counted; what a step makes in passing is rehearsed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tasks.rlhf.models import lora
from tasks.rlhf.training import dry_run
from tasks.rlhf.training.dry_run import Plan
from tasks.system.errors import InputError

# glibc's heap on a CPU keeps holes between tensors under 32 MB: measured, over what a step makes in passing without checkpointing. Adapters leave
# more of them, with their many small tensors between the large.
HEAP_ADAPTER, HEAP_FULL = 1.1, 0.5


class Estimate(NamedTuple):
    """Bytes at the peak of a training step."""

    weights: int  # of the base, frozen or not
    adapters: int
    gradients: int
    optimizer: int  # AdamW's two moments, which torch keeps in the parameter's type
    activations: int  # what the layers keep for the backward pass
    logits: int  # what the head's chunks add to that
    workspace: int  # what the backward pass through the layers adds to both, weights in passing, and slack
    heap: int  # on a CPU, holes between tensors
    plan: Plan

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[:-1])

    @property
    def needed(self) -> int:
        """All but the holes, which `room.map_large_tensors` avoids."""
        return self.total - self.heap


def estimate(plan: Plan) -> Estimate:
    """Peak memory of a training step, in bytes."""
    return _complete(_counted(plan))


def told(estimate: Estimate) -> str:
    """One line: 17.2 GB: weights 3.9 GB, activations 9.1 GB, ..."""
    parts = [
        (size, f"{name} {gigabytes(size)}")
        for name, size in estimate._asdict().items()
        if name != "plan" and size
    ]
    return f"{gigabytes(estimate.total)}: " + ", ".join(
        text for _, text in sorted(parts, key=lambda part: -part[0])
    )


def check(estimate: Estimate, available: int) -> None:
    """Refuse a step that needs more than ``available`` bytes, with the first change that makes it fit.

    For its ``total``, see `room.map_large_tensors`.
    """
    if estimate.needed <= available:
        return
    advice = f"nothing that can be set here makes it fit: take a smaller base or a device with more memory than {gigabytes(available)}"
    seen = estimate
    for setting, plan in _alternatives(estimate.plan):
        if plan == seen.plan._replace(rows=plan.rows) and _at_least(seen, plan.rows) > available:
            continue
        smaller = _counted(plan)
        if smaller.needed <= available and (seen := _complete(smaller)).needed <= available:
            advice = f"with {setting} it takes {gigabytes(seen.needed)}"
            break
    holes = f", and up to {gigabytes(estimate.total)} with the holes of the heap" if estimate.heap else ""
    raise InputError(
        f"A training step would take about {told(estimate._replace(heap=0))}{holes}; {gigabytes(available)} are free: {advice}."
    )


def _counted(plan: Plan) -> Estimate:
    """What lies there between two steps."""
    assert plan.rank is not None or plan.precision not in ("int8", "nf4"), "a quantised base cannot train"
    model = dry_run.bare(plan)
    added, weights = 0, dry_run.weight_bytes(model, plan)
    trained = dry_run.num_bytes(model.parameters())
    if plan.rank is not None:
        trained = added = plan.num_adapters * dry_run.num_bytes(
            lora.parameters(dry_run.adapted(model, plan), "rehearsed").values()
        )
    return Estimate(
        weights,
        added,
        gradients=trained,
        optimizer=2 * trained,
        activations=0,
        logits=0,
        workspace=0,
        heap=0,
        plan=plan,
    )


def _complete(counted: Estimate) -> Estimate:
    """The estimate with what a step makes in passing."""
    plan = counted.plan
    passing, heap = dry_run.passing(plan), 0
    if plan.device.type == "cpu" and not plan.mapped:
        kept_all = dry_run.passing(plan._replace(checkpointing=False)) if plan.checkpointing else passing
        heap = round(sum(kept_all) * (HEAP_FULL if plan.rank is None else HEAP_ADAPTER))
    return counted._replace(heap=heap, **passing._asdict())


def _at_least(larger: Estimate, rows: int) -> float:
    """A bound for fewer rows that needs no rehearsal: what a step makes in passing shrinks with them at most."""
    passing = larger.activations + larger.logits + larger.workspace
    return larger.needed - passing * (1 - rows / larger.plan.rows)


def _alternatives(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """What to set and what it gives: what leaves the result as it is comes first, then what costs a little quality, then all together."""
    settings: list[str] = []
    for rows in _halves(plan.rows):
        yield f"machine.micro_batch={rows}", plan._replace(rows=rows)
    if not plan.checkpointing:
        settings, checkpointed = ["machine.gradient_checkpointing=true"], plan._replace(checkpointing=True)
        yield settings[0], checkpointed
        for rows in _halves(plan.rows):
            yield (
                f"machine.gradient_checkpointing=true and machine.micro_batch={rows}",
                checkpointed._replace(rows=rows),
            )
    if plan.rows > 1:
        settings.append("machine.micro_batch=1")
    least = plan._replace(checkpointing=True, rows=1)
    if plan.rank is None:
        yield "tune=lora instead of full", plan._replace(rank=16)
        settings.append("tune=lora instead of full")
        least = least._replace(rank=16)
    if plan.precision not in ("int8", "nf4"):
        if plan.rank is not None:
            yield "frozen weights in nf4 (weights.*)", plan._replace(precision="nf4")
        settings.append("frozen weights in nf4 (weights.*)")
        least = least._replace(precision="nf4")
    yield (
        "text.max_prompt_tokens and text.max_answer_tokens halved",
        plan._replace(tokens=-(-plan.tokens // 2)),
    )
    if settings:
        yield " and ".join(settings), least
    yield (
        " and ".join(["text.max_prompt_tokens and text.max_answer_tokens halved", *settings]),
        least._replace(tokens=-(-plan.tokens // 2)),
    )


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def gigabytes(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
