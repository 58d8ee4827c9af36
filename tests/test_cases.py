"""The small inputs of shared/cases: files in the shape of public ones that alignflow once read wrongly."""

import json
from pathlib import Path

import attention_models
import pytest
import tiny

from tasks.rlhf import attention_masks, layout_checks
from tasks.rlhf.comparisons import Comparison
from tasks.rlhf.packing import Document, pack

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the small inputs of shared/cases are not on this machine")


def test_every_folder_of_cases_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [folder.name for folder in sorted(CASES.iterdir()) if folder.is_dir() and f'CASES / "{folder.name}"' not in text] == []


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_window_packed_and_shared_texts_keep_a_window_of_96(kind: str) -> None:
    lines = (CASES / "window" / "own.jsonl").read_text().splitlines()
    rows = sorted(map(json.loads, lines), key=lambda row: len(row["prompt"]))[::12]  # from the shortest to the longest
    tokenizer, model = tiny.tokenizer(), attention_models.model(kind, window=96, context=1024)
    texts = [[tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")] for row in rows]
    documents = [Document(prompt + chosen, [True] * len(prompt + chosen)) for prompt, chosen, _ in texts]
    assert min(len(d.ids) for d in documents) < 96 < max(len(d.ids) for d in documents)
    blocks = pack(documents, block_tokens=1024, pad_id=tiny.PAD)
    questions = [Comparison(i, p, [c, r], [(0, 1)], [1.0], [None]) for i, (p, c, r) in enumerate(texts)]
    for gap in (layout_checks.packing_gap(model, blocks), layout_checks.sharing_gap(model, questions, pad_id=tiny.PAD)):
        assert gap.nats < 1e-5  # 0.04 to 0.13 without the window
    assert not attention_masks.are_texts_apart(model)
