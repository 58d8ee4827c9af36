"""Test sampling by transformers' engine: the model's distribution, reproducible, refused in a sentence."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel

from tasks.rlhf.batches import sequences
from tasks.rlhf.batches.sampling import Samples
from tasks.rlhf.training import continuous_batching
from tasks.system.errors import InputError
from tests.support import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [20, 21]] * 2
ENDS = tuple(range(3, 30))  # so many that some answers end early


def draw(
    model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, *, seed: int = 0, **changed: Any
) -> Samples:
    settings = {"max_tokens": 12, "temperature": 0.7, "end_ids": ENDS, "pad_id": tiny.PAD} | changed
    return continuous_batching.sample(model, prompts, seed=seed, **settings)


def answers(samples: Samples) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]


def assert_ends(found: list[list[int]], ends: Sequence[int], most: int) -> None:
    for answer in found:
        assert 1 <= len(answer) <= most
        assert not set(answer[:-1]) & set(ends)
        assert answer[-1] in ends or len(answer) == most


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_it_is_the_models_own_distribution_and_disturbs_nothing(kind: str) -> None:
    model = tiny.model(kind)
    torch.manual_seed(1)
    before, implementation = torch.get_rng_state(), model.config._attn_implementation
    samples = draw(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config._attn_implementation == implementation
    found = answers(samples)
    assert_ends(found, ENDS, 12)
    assert len({len(answer) for answer in found}) > 1
    batch = sequences.join(PROMPTS, found, pad_id=tiny.PAD, device=tiny.CPU)
    with torch.no_grad():
        scored = sequences.log_probs(model, batch, temperature=0.7)
    torch.testing.assert_close(samples.logp[samples.mask], scored[batch.response_mask], atol=1e-4, rtol=1e-4)
    assert (samples.logp[~samples.mask] == 0).all()
    assert (samples.ids[~samples.mask] == tiny.PAD).all()
    assert answers(draw(model)) == found
    assert answers(draw(model, seed=1)) != found


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model = tiny.model("llama")
    samples = draw(model, [[5, 6, 7]] * 200, max_tokens=1, temperature=0.25)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double() / 0.25
    expected = torch.softmax(logits, dim=0) * 200
    counts = torch.bincount(samples.ids[:, 0], minlength=len(expected)).double()
    often = expected >= 5
    seen = [*counts[often].tolist(), counts[~often].sum().item()]
    wanted = [*expected[often].tolist(), expected[~often].sum().item()]
    assert chisquare(seen, wanted).pvalue > 1e-3


def test_what_it_cannot_do_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    implementation = model.config._attn_implementation

    def refuse(**_: Any) -> None:
        model.set_attn_implementation("eager")
        raise ValueError("no paged attention\nfor this one")

    monkeypatch.setattr(model, "init_continuous_batching", refuse)
    with pytest.raises(InputError, match=r"\(no paged attention\): set ppo.sampler=plain\.$"):
        draw(model)
    assert model.config._attn_implementation == implementation


def test_an_engine_that_breaks_off_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(model.get_output_embeddings(), "forward", fail)
    with pytest.raises(InputError, match="no room"):
        draw(model)
