"""Test that packed documents do not see each other, none is lost, and labels are right."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.rlhf.batches import forward, layout_checks
from tasks.rlhf.batches.packing import IGNORE, Blocks, Document, block_loss, pack, pack_documents
from tests.support import tiny


def documents(num: int = 12, *, longest: int = 30, seed: int = 0) -> list[Document]:
    """Return random ids; the first third of each document is a prompt, which the loss does not count."""
    rng = random.Random(seed)
    made = []
    for _ in range(num):
        length = rng.randint(2, longest)
        made.append(
            Document(
                [rng.randrange(2, tiny.VOCABULARY) for _ in range(length - 1)] + [tiny.EOS],
                [i >= length // 3 for i in range(length)],
            )
        )
    return made


def spans(blocks: Blocks) -> list[tuple[int, int, int]]:
    """Return (row, from, to) of every document in the blocks, padding included."""
    found = []
    for row, positions in enumerate(blocks.position_ids):
        starts = [*torch.where(positions == 0)[0].tolist(), len(positions)]
        found += [(row, a, b) for a, b in pairwise(starts)]
    return found


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_packed_logits_are_those_of_each_document_alone(kind: str) -> None:
    model = tiny.model(kind)
    members = documents()
    blocks = pack(members, block_tokens=64, pad_id=tiny.PAD)
    assert len(blocks.input_ids) < len(members)
    with torch.no_grad():
        packed = forward.output_head(model)(
            forward.hidden_states(model, blocks.input_ids, blocks.position_ids)
        )
        alone = {tuple(d.ids): model(torch.tensor([d.ids]), use_cache=False).logits[0] for d in members}
    compared = 0
    for row, a, b in spans(blocks):
        ids = tuple(blocks.input_ids[row, a:b].tolist())
        if ids in alone:
            torch.testing.assert_close(packed[row, a:b], alone[ids], atol=1e-5, rtol=0)
            compared += 1
    assert compared == len(members)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_leak_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(kind)
    blocks = pack(documents(), block_tokens=64, pad_id=tiny.PAD)
    assert layout_checks.packing_gap(model, blocks).hidden < 1e-5

    def leaking(
        base: object, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        mask = torch.ones_like(input_ids)
        return model.base_model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state

    monkeypatch.setattr(forward, "hidden_states", leaking)
    assert layout_checks.packing_gap(model, blocks).hidden > 1e-2


def test_a_leak_is_noticed_where_only_a_later_block_holds_several_documents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model()
    full = Document([5, 6, 7, 8] * 8, [True] * 32)
    blocks = pack([full, *documents(6, longest=10)], block_tokens=32, pad_id=tiny.PAD)
    honest = forward.hidden_states
    monkeypatch.setattr(forward, "hidden_states", lambda base, ids, positions=None: honest(base, ids))
    assert layout_checks.packing_gap(model, blocks).hidden > 1e-2


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(8, 64), st.integers(0, 10))
def test_no_document_is_lost_and_labels_are_right(
    num: int, longest: int, block_tokens: int, seed: int
) -> None:
    members = documents(num, longest=longest, seed=seed)
    blocks = pack(members, block_tokens=block_tokens, pad_id=tiny.PAD)
    assert (
        blocks.input_ids.shape
        == blocks.position_ids.shape
        == blocks.labels.shape
        == (len(blocks.labels), block_tokens)
    )
    found = []
    for row, a, b in spans(blocks):
        ids, labels = blocks.input_ids[row, a:b].tolist(), blocks.labels[row, a:b].tolist()
        assert blocks.position_ids[row, a:b].tolist() == list(range(b - a))
        assert labels[0] == IGNORE  # the first token is nobody's target
        if ids[0] == tiny.PAD:
            assert set(ids) == {tiny.PAD}
            assert set(labels) == {IGNORE}
            assert b - a <= max(len(d.ids) for d in members)  # or a model might have no such position
        else:
            found.append((ids, [label != IGNORE for label in labels]))
            assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    expected = [
        (d.ids[:block_tokens], [counts and i > 0 for i, counts in enumerate(d.target[:block_tokens])])
        for d in members
    ]
    assert sorted(found) == sorted(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(8, 40), st.data())
def test_blocks_that_are_made_one_by_one_are_those_of_all(
    num: int, block_tokens: int, data: st.DataObject
) -> None:
    members = documents(num)
    whole = pack(members, block_tokens=block_tokens, pad_id=tiny.PAD)
    lengths = [len(document.ids) for document in members]
    packed = pack_documents(members, lengths, block_tokens=block_tokens, pad_id=tiny.PAD)
    rows = data.draw(st.lists(st.integers(0, len(packed) - 1), max_size=4))
    for found, wanted in zip(packed.blocks(rows), whole, strict=True):
        assert torch.equal(found, wanted[rows])
    assert packed.num_targets() == int((whole.labels != IGNORE).sum())
    hardest = packed.hardest().position_ids
    assert hardest.max() == whole.position_ids.max()
    assert (hardest == 0).sum(dim=1).max() == (whole.position_ids == 0).sum(dim=1).max()


def test_block_loss_is_the_loss_of_the_documents_one_by_one() -> None:
    model = tiny.model()
    members = documents()
    blocks = pack(members, block_tokens=64, pad_id=tiny.PAD)
    count = int((blocks.labels != IGNORE).sum())
    assert count == sum(sum(d.target[1:]) for d in members)
    packed = block_loss(model, blocks, torch.arange(len(blocks.labels)), tiny.CPU, count=count)
    total = 0.0
    for document in members:
        logp = model(torch.tensor([document.ids])).logits[0].log_softmax(dim=-1)
        total -= sum(
            logp[i - 1, token].item()
            for i, (token, counts) in enumerate(zip(*document, strict=True))
            if counts and i
        )
    assert packed.item() == pytest.approx(total / count, rel=1e-5)


def test_the_order_of_short_documents_is_nearly_kept() -> None:
    members = [Document([10 + i, 10 + i, tiny.EOS], [True] * 3) for i in range(20)]
    blocks = pack(members, block_tokens=9, pad_id=tiny.PAD)
    assert [
        blocks.input_ids[row, a].item() for row, a, _ in spans(blocks) if blocks.input_ids[row, a] != tiny.PAD
    ] == list(range(10, 30))
