"""Identify the base that an adapter was trained on, and refuse another one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from tasks.rlhf.models.loading import precision_of, stored_dtype
from tasks.system.errors import InputError

RECORD = "base.json"  # beside an adapter's own files
WEIGHTS = ("*.safetensors",)
TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


class Fingerprint(NamedTuple):
    """A base as an adapter knows it."""

    weights: str  # sha256 over the safetensors files
    tokenizer: str  # sha256 over its files
    precision: str  # as of `precision_of`
    compute: str  # type of the activations, unless a CPU takes float32 for speed


def compute_fingerprint(folder: Path, model: PreTrainedModel) -> Fingerprint:
    """That of ``model``, loaded from ``folder``."""
    return Fingerprint(
        _digest(folder, WEIGHTS),
        _digest(folder, TOKENIZER),
        precision_of(model),
        str(stored_dtype(model)).removeprefix("torch."),
    )


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def save_fingerprint(base: Fingerprint, folder: Path) -> None:
    """Write down in an adapter's folder what it was trained on."""
    (folder / RECORD).write_text(json.dumps(base._asdict(), indent=1) + "\n")


def load_fingerprint(folder: Path) -> Fingerprint:
    """What the adapter in ``folder`` was trained on."""
    try:
        return Fingerprint(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder} does not say in {RECORD} which base the adapter was trained on: train it again."
        ) from error


def check_fingerprint(folder: Path, actual: Fingerprint, *, setting: str) -> None:
    """Refuse an adapter that was trained on another base; ``setting`` is the name under which the user chooses the precision."""
    if told := describe_mismatch(load_fingerprint(folder), actual, setting=setting):
        raise InputError(told)


def describe_mismatch(trained: Fingerprint, actual: Fingerprint, *, setting: str) -> str | None:
    """A sentence on all that differs, None where nothing does; ``setting`` is the name under which the user chooses the precision."""
    differences = []
    if trained.weights != actual.weights:
        differences.append(
            f"its base's weights were {trained.weights[:15]} and these are {actual.weights[:15]} (give the base it was trained on)"
        )
    if trained.tokenizer != actual.tokenizer:
        differences.append(
            f"its tokenizer was {trained.tokenizer[:15]} and this one is {actual.tokenizer[:15]} (put the base's files back)"
        )
    if trained.precision != actual.precision:
        differences.append(
            f"it was trained on a base in {trained.precision} and this one is in {actual.precision} (set {setting} to {trained.precision})"
        )
    elif trained.compute != actual.compute:
        differences.append(
            f"its base computed in {trained.compute} and this one does in {actual.compute} (give the base as it was stored)"
        )
    return f"The adapter does not belong to this base: {'; '.join(differences)}." if differences else None
