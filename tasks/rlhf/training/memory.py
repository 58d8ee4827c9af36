"""Estimate the peak memory of a training step before the model is loaded.

Weights, gradients and optimizer states are counted; what exists only during a step is measured by a dry run.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tasks.rlhf.models import lora
from tasks.rlhf.training import dry_run
from tasks.rlhf.training.dry_run import StepSpec
from tasks.system.errors import InputError

# glibc's heap on a CPU leaves holes between tensors under 32 MB: measured, relative to the transient memory
# without checkpointing. Adapters leave more of them, with many small tensors between large ones.
HEAP_ADAPTER, HEAP_FULL = 1.1, 0.5


class Estimate(NamedTuple):
    """Bytes at the peak of a training step."""

    weights: int  # of the base, frozen or not
    adapters: int
    gradients: int
    optimizer: int  # AdamW's two moments, which torch keeps in the parameter's type
    activations: int  # what the layers keep for the backward pass
    logits: int  # what the head's chunks add to that
    workspace: int  # what the backward pass through the layers adds to both, dequantised weights, and slack
    heap: int  # on a CPU, holes between tensors
    spec: StepSpec

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self[:-1])

    @property
    def needed(self) -> int:
        """Return all but the holes, which `free_memory.map_large_tensors` avoids."""
        return self.total - self.heap


def estimate(spec: StepSpec) -> Estimate:
    """Estimate the peak memory of a training step, in bytes."""
    return _with_transient(_persistent(spec))


def format_estimate(estimate: Estimate) -> str:
    """Return one line: 17.2 GB: activations 9.1 GB, weights 3.9 GB, ..."""
    sizes = {name: size for name, size in estimate._asdict().items() if name != "spec" and size}
    largest_first = sorted(sizes.items(), key=lambda part: -part[1])
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in largest_first)
    return f"{format_bytes(estimate.total)}: {parts}"


def check_fits(estimate: Estimate, available: int) -> None:
    """Raise InputError for a step that needs more than ``available`` bytes, with the first change that makes
    it fit.

    The heap's holes are not counted: `free_memory.map_large_tensors` avoids them.
    """
    if estimate.needed <= available:
        return
    advice = (
        "nothing that can be set here makes it fit: "
        f"take a smaller base or a device with more memory than {format_bytes(available)}"
    )
    last = estimate
    for setting, spec in _alternatives(estimate.spec):
        fewer_rows_only = spec == last.spec._replace(rows=spec.rows)
        if fewer_rows_only and _lower_bound(last, spec.rows) > available:
            continue
        smaller = _persistent(spec)
        if smaller.needed <= available and (last := _with_transient(smaller)).needed <= available:
            advice = f"with {setting} it takes {format_bytes(last.needed)}"
            break
    holes = f", and up to {format_bytes(estimate.total)} with the holes of the heap" if estimate.heap else ""
    raise InputError(
        f"A training step would take about {format_estimate(estimate._replace(heap=0))}{holes}; "
        f"{format_bytes(available)} are free: {advice}."
    )


def _persistent(spec: StepSpec) -> Estimate:
    """Return the estimate of the memory that is held between steps."""
    assert spec.rank is not None or spec.precision not in ("int8", "nf4"), "a quantised base cannot train"
    model = dry_run.empty_model(spec)
    added, weights = 0, dry_run.weight_bytes(model, spec)
    trained = dry_run.num_bytes(model.parameters())
    if spec.rank is not None:
        adapter = lora.parameters(dry_run.attach_adapter(model, spec), dry_run.NAME)
        trained = added = spec.num_adapters * dry_run.num_bytes(adapter.values())
    return Estimate(
        weights=weights,
        adapters=added,
        gradients=trained,
        optimizer=2 * trained,
        activations=0,
        logits=0,
        workspace=0,
        heap=0,
        spec=spec,
    )


def _with_transient(persistent: Estimate) -> Estimate:
    """Return the estimate with the memory that exists only during a step."""
    spec = persistent.spec
    transient, heap = dry_run.measure_transient(spec), 0
    if spec.device.type == "cpu" and not spec.mapped:
        unsaved = (
            dry_run.measure_transient(spec._replace(checkpointing=False)) if spec.checkpointing else transient
        )
        heap = round(sum(unsaved) * (HEAP_FULL if spec.rank is None else HEAP_ADAPTER))
    return persistent._replace(heap=heap, **transient._asdict())


def _lower_bound(larger: Estimate, rows: int) -> float:
    """Return a bound for fewer rows that needs no dry run: transient memory shrinks at most in proportion to
    them.
    """
    transient = larger.activations + larger.logits + larger.workspace
    return larger.needed - transient * (1 - rows / larger.spec.rows)


def _alternatives(spec: StepSpec) -> Iterator[tuple[str, StepSpec]]:
    """Yield what to set and the step that results: first what leaves the result unchanged, then what costs
    quality, then all together.
    """
    settings: list[str] = []
    for rows in _halves(spec.rows):
        yield f"machine.micro_batch={rows}", spec._replace(rows=rows)
    if not spec.checkpointing:
        settings, checkpointed = ["machine.gradient_checkpointing=true"], spec._replace(checkpointing=True)
        yield settings[0], checkpointed
        for rows in _halves(spec.rows):
            both = f"machine.gradient_checkpointing=true and machine.micro_batch={rows}"
            yield both, checkpointed._replace(rows=rows)
    if spec.rows > 1:
        settings.append("machine.micro_batch=1")
    least = spec._replace(checkpointing=True, rows=1)
    if spec.rank is None:
        yield "tune=lora instead of full", spec._replace(rank=16)
        settings.append("tune=lora instead of full")
        least = least._replace(rank=16)
    if spec.precision not in ("int8", "nf4"):
        if spec.rank is not None:
            yield "frozen weights in nf4 (weights.*)", spec._replace(precision="nf4")
        settings.append("frozen weights in nf4 (weights.*)")
        least = least._replace(precision="nf4")
    shorter, half = "text.max_prompt_tokens and text.max_answer_tokens halved", -(-spec.tokens // 2)
    yield shorter, spec._replace(tokens=half)
    if settings:
        yield " and ".join(settings), least
    yield " and ".join([shorter, *settings]), least._replace(tokens=half)


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def format_bytes(size: int) -> str:
    """Return a number of bytes as text: 17.2 GB, or 350 MB below one GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
