"""Write tiny trained policies: a base, and adapters on it that change what it says."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tasks.config.commands.usage import PolicyFiles
from tasks.dataset.tables import COLUMNS
from tasks.rlhf.models import fingerprint, loading, trainable
from tests.support import tiny


def adapter(folder: Path, base: Path, *, seed: int = 1) -> Path:
    """Write an artifact with a LoRA adapter on a base, and return it."""
    model = loading.load(base, device=tiny.CPU)
    actual = fingerprint.compute_fingerprint(base, model)
    torch.manual_seed(seed)
    tuned = trainable.attach_lora(
        model, "tuned", rank=4, alpha=8.0, dropout=0.0, targets="all-linear", fingerprint=actual
    )
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter.normal_(std=0.2)
    folder.mkdir(parents=True)
    tuned.save(folder)
    return folder


def policy(base: Path, tuned: Path | None = None, **settings: Any) -> PolicyFiles:
    """Return a policy of plain prompts that answers with at most 12 tokens."""
    return PolicyFiles(
        **{
            "name": tuned.name if tuned else "base",
            "folder": str(base),
            "tuned": str(tuned) if tuned else "",
            "template": "question-answer",
            "max_answer_tokens": 12,
            **settings,
        }
    )


def data_tables(folder: Path) -> Path:
    """Write tables of the data stage with all their columns and one row each."""
    common = {"question_id": 1, "prompt": "How? ", "site": "s"}
    texts = {"answer": " This. ", "chosen": "This.", "rejected": "That.", "answers": ["That.", "This."]}
    numbers = {"score": 2.0, "chosen_score": 2.0, "rejected_score": 0.0, "scores": [0.0, 2.0], "best": 1}
    for name, columns in COLUMNS.items():
        row = {**common, **texts, **numbers}
        for column in columns:
            if column.endswith(("_url", "_author", "_author_name", "_licence")):
                ranked = name in ("evaluation", "reward_groups") and column.startswith("answer_")
                row[column] = [f"{column} 0", f"{column} 1"] if ranked else column
        schema = pa.schema(columns.items())
        pq.write_table(pa.Table.from_pylist([row], schema), folder / f"{name}.parquet")
    return folder
