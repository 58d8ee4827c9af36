"""Test sampling: the model's own distribution, the scorer's log_probs, and independent rows."""

import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from tasks.rlhf.batches import key_value_cache, sampling, sequences
from tasks.rlhf.batches.sampling import Samples
from tests.support import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [20, 21]]


def draw(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    seed: int = 0,
    max_tokens: int = 20,
    temperature: float = 1.0,
    eos: int = tiny.EOS,
) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    return sampling.sample(
        model,
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        end_ids=(eos,),
        pad_id=tiny.PAD,
        generator=generator,
    )


def eager_to_stop(model: PreTrainedModel, rise: float = 4.0) -> PreTrainedModel:
    """Return the model with its end token's logit raised by ``rise``: it ends its answers after a few
    tokens.
    """
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, inputs, output: (
            output + rise * torch.nn.functional.one_hot(torch.tensor(tiny.EOS), output.shape[-1])
        )
    )
    return model


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_scorer_agree_on_left_padded_prompts(kind: str, temperature: float) -> None:
    model = eager_to_stop(tiny.model(kind))
    samples = draw(model, PROMPTS, temperature=temperature)
    assert samples.mask.sum(dim=1).unique().numel() > 1  # some end before others
    answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
    batch = sequences.join(PROMPTS, answers, pad_id=tiny.PAD, device=tiny.CPU)
    with torch.no_grad():
        scored = sequences.log_probs(model, batch, temperature=temperature)
    torch.testing.assert_close(samples.logp[samples.mask], scored[batch.response_mask], atol=1e-4, rtol=1e-4)


def test_the_end_token_ends_an_answer_and_belongs_to_it() -> None:
    samples = draw(eager_to_stop(tiny.model()), PROMPTS * 8, max_tokens=12)
    lengths = samples.mask.sum(dim=1)
    ended = 0
    for ids, mask, logp, length in zip(
        samples.ids, samples.mask, samples.logp, lengths.tolist(), strict=True
    ):
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert tiny.EOS not in ids[: length - 1]
        assert ids[length - 1] == tiny.EOS or length == 12
        assert set(ids[length:].tolist()) <= {tiny.PAD}
        assert not logp[length:].any()
        ended += ids[length - 1].item() == tiny.EOS
    assert 0 < ended < 32


def test_sampling_stops_when_every_answer_has_ended() -> None:
    samples = draw(eager_to_stop(tiny.model(), rise=100.0), PROMPTS, max_tokens=50)
    assert samples.ids.tolist() == [[tiny.EOS]] * 4


def test_samples_follow_the_models_distribution() -> None:
    model = tiny.model(weight_scale=12.0)
    num, temperature = 4000, 1.3
    samples = draw(model, [PROMPTS[0]] * num, max_tokens=1, temperature=temperature)
    with torch.no_grad():
        p = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(dim=0)
    likely = torch.where(p * num >= 5)[0]
    assert len(likely) >= 10
    counts = torch.bincount(samples.ids[:, 0], minlength=len(p)).double()
    observed = torch.cat([counts[likely], (num - counts[likely].sum())[None]])
    expected = torch.cat([p[likely].double(), (1 - p[likely].double().sum())[None]]) * num
    assert chisquare(observed.numpy(), (expected / expected.sum() * num).numpy()).pvalue > 1e-3
    other = (model(torch.tensor([PROMPTS[0]])).logits[0, -1]).softmax(
        dim=0
    )  # a test that can tell: temperature 1 does not fit
    expected = torch.cat([other[likely].double(), (1 - other[likely].double().sum())[None]]) * num
    assert chisquare(observed.numpy(), (expected / expected.sum() * num).numpy()).pvalue < 1e-6


def test_tokens_of_zero_probability_are_never_drawn() -> None:
    logp = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).repeat(6, 1).log_softmax(dim=1)
    assert (
        sampling._inverse_cdf(
            logp, torch.tensor([0.0, 1e-9, 0.5, 0.999, 1 - 2**-24, 1 - 2**-48], dtype=torch.float64)
        ).tolist()
        == [1] * 6
    )


def test_an_answer_does_not_depend_on_when_others_end() -> None:
    model = eager_to_stop(tiny.model())
    free = draw(model, PROMPTS)
    endless = draw(model, PROMPTS, eos=-1)  # nobody ends
    assert free.ids.shape[1] <= endless.ids.shape[1]
    for row in range(4):
        length = int(free.mask[row].sum())
        assert free.ids[row, :length].tolist() == endless.ids[row, :length].tolist()


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_ended_rows_leave_the_batch_and_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eager_to_stop(tiny.model(kind))
    uniform = torch.rand(16, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )

    def answers(kept_share: float) -> Samples:
        monkeypatch.setattr(sampling, "KEPT_SHARE", kept_share)
        sizes.clear()
        return sampling.sample(
            model,
            PROMPTS * 4,
            max_tokens=40,
            temperature=1.0,
            end_ids=(tiny.EOS,),
            pad_id=tiny.PAD,
            uniform=uniform,
        )

    whole = answers(0.0)
    assert set(sizes) == {16}
    left = answers(0.75)
    hook.remove()
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    unfinished = whole.mask.sum(dim=0)  # (R,)
    assert all(size * 0.75 < n for size, n in zip(sizes[1:], unfinished[1:].tolist(), strict=True))
    assert torch.equal(left.ids, whole.ids)
    assert torch.equal(left.mask, whole.mask)
    torch.testing.assert_close(left.logp, whole.logp, atol=1e-5, rtol=1e-5)


def test_rows_of_a_model_with_a_state_of_its_own_stay() -> None:
    cache = key_value_cache.new_cache()
    assert not key_value_cache.holds_all_rows(cache, 2, 3)  # nothing was written: the state is elsewhere
    keys = torch.randn(2, 1, 3, 4)
    cache.update(keys, keys, 0)
    assert key_value_cache.holds_all_rows(cache, 2, 3)
    assert not key_value_cache.holds_all_rows(cache, 2, 4)
    assert not key_value_cache.holds_all_rows(cache, 1, 3)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=2))
    cache.layers[1].update(keys, keys)
    assert not key_value_cache.holds_all_rows(cache, 2, 3)


def test_a_cache_is_seldom_copied_and_returns_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_value_cache, "ROOM", 4)
    cache, plain = key_value_cache.new_cache(), DynamicCache()
    places = []
    for width in (3, *[1] * 10):
        new = torch.randn(4, 2, width, 5), torch.randn(4, 2, width, 6)  # values may be of another width
        found, expected = cache.update(*new, 0), plain.update(*new, 0)
        assert all(map(torch.equal, found, expected))
        places.append(found[0].data_ptr())
    assert [places.count(place) for place in dict.fromkeys(places)] == [5, 5, 1]
    key_value_cache.select_rows(cache, torch.tensor([2, 0]))
    plain.batch_select_indices(torch.tensor([2, 0]))
    new = torch.randn(2, 2, 1, 5), torch.randn(2, 2, 1, 6)
    assert all(map(torch.equal, cache.update(*new, 0), plain.update(*new, 0)))


def test_an_answer_does_not_depend_on_what_others_ask() -> None:
    model = eager_to_stop(tiny.model())
    before = draw(model, PROMPTS)
    after = draw(model, [PROMPTS[0], [7] * 11, [3, 4], PROMPTS[3]])
    for row in (0, 3):
        assert before.ids[row][before.mask[row]].tolist() == after.ids[row][after.mask[row]].tolist()


def test_the_seed_decides() -> None:
    model = tiny.model()
    assert torch.equal(draw(model, PROMPTS, seed=3).ids, draw(model, PROMPTS, seed=3).ids)
    assert not torch.equal(draw(model, PROMPTS, seed=3).ids, draw(model, PROMPTS, seed=4).ids)


def test_either_end_token_ends_an_answer() -> None:
    model = tiny.model()
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output + 4.0 * torch.isin(torch.arange(320), torch.tensor([1, 7]))
    )
    samples = sampling.sample(
        model, PROMPTS * 16, max_tokens=12, temperature=1.0, end_ids=(7, tiny.EOS), pad_id=tiny.PAD
    )
    answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
    assert {answer[-1] for answer in answers} >= {7, tiny.EOS}
    for answer in answers:
        assert not {7, tiny.EOS} & set(answer[:-1])
        assert answer[-1] in (7, tiny.EOS) or len(answer) == 12


def test_every_token_of_a_large_vocabulary_can_be_drawn() -> None:
    """Each token's interval of the cumulative sum holds as many of the sampler's numbers as its probability
    says.
    """
    vocabulary, bits = 152_000, 48
    logp = (3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))).log_softmax(dim=0)
    p = logp.double().softmax(dim=0)
    some = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))[:64]
    upper = p.cumsum(0)
    middle = (((upper - p / 2)[some] * 2**bits).round() / 2**bits).clamp(
        max=1 - 2**-bits
    )  # on the grid of 2^-48
    assert sampling._inverse_cdf(logp.expand(64, -1), middle).tolist() == some.tolist()
    numbers = (upper * 2**bits).ceil().diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert numbers.min() > 10  # p of the rarest is about 1e-12
    assert (numbers / 2**bits / p - 1).abs().max() < 0.1


@pytest.mark.parametrize("vocabulary", [sampling.VOCABULARY_CHUNK + 1, 3 * sampling.VOCABULARY_CHUNK, 20_000])
def test_a_large_vocabulary_in_parts_is_drawn_from_as_in_one_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(256, vocabulary, generator=generator)
    logits[:, : sampling.VOCABULARY_CHUNK // 2] = logits[
        :, -vocabulary // 3 :
    ] = -torch.inf  # whole parts among them
    logp, numbers = logits.log_softmax(dim=-1), torch.rand(256, generator=generator, dtype=torch.float64)
    numbers[:2] = torch.tensor([0.0, 1 - 2**-48], dtype=torch.float64)
    cdf = logp.double().exp().cumsum(dim=-1)
    expected = torch.searchsorted(cdf, (numbers * cdf[:, -1])[:, None], right=True)[:, 0]
    drawn = sampling._inverse_cdf(logp, numbers)
    assert drawn.equal(expected)
    assert logp.gather(1, drawn[:, None]).isfinite().all()
    assert (
        sampling._inverse_cdf(torch.full_like(logp, torch.nan), numbers) < vocabulary
    ).all()  # the caller says what is wrong


def test_rare_tokens_come_up_as_often_as_they_should() -> None:
    """Tokens of probability 2^-30: a grid of 2^-24 has a point for one in 64 of them only."""
    vocabulary, num = 20_000, 400
    p = torch.full((vocabulary,), 2.0**-30, dtype=torch.float64)
    p[0] = 1 - p[1:].sum()
    logp = p.log().float().expand(num, -1)
    generator, fine = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    numbers = sampling._uniform(num, generator, fine) * p[1:].sum() + p[0]  # where the rare ones are
    drawn = sampling._inverse_cdf(logp, numbers)
    assert (drawn > 0).all()
    assert drawn.unique().numel() > 0.95 * num
    assert len({token % 64 for token in drawn.tolist()}) > 60
    assert kstest(drawn.numpy() / vocabulary, "uniform").pvalue > 1e-3


def test_numbers_are_uniform_beyond_float32() -> None:
    numbers = sampling._uniform(20_000, torch.Generator().manual_seed(3), torch.Generator().manual_seed(4))
    assert kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    assert kstest((numbers * 2**24 % 1).numpy(), "uniform").pvalue > 1e-3
    assert numbers.max() < 1
    same = torch.rand(20_000, generator=torch.Generator().manual_seed(3))
    assert ((numbers - same.double()).abs() < 2**-24).all()  # a small vocabulary's tokens are those of before


def test_given_numbers_decide_row_by_row() -> None:
    model = eager_to_stop(tiny.model())
    uniform = torch.rand(4, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def answers(rows: list[int]) -> list[list[int]]:
        prompts = [PROMPTS[i] for i in rows]
        found = sampling.sample(
            model,
            prompts,
            max_tokens=20,
            temperature=1.0,
            end_ids=(tiny.EOS,),
            pad_id=tiny.PAD,
            uniform=uniform[rows],
        )
        return [ids[mask].tolist() for ids, mask in zip(found.ids, found.mask, strict=True)]

    together = answers([0, 1, 2, 3])
    assert answers([3, 0]) == [together[3], together[0]]
    assert answers([2]) == [together[2]]


def test_the_head_gets_the_last_states_as_a_tensor_of_their_own() -> None:
    # In bfloat16 a view of all states made torch copy the head for every row: 2 GB of 32,000 tokens and 64
    # rows of 512 values.
    model = tiny.model("llama")
    seen = []
    head = model.get_output_embeddings()
    with head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous())):
        draw(model, PROMPTS, max_tokens=3)
    assert seen == [True] * 3
    assert not head._forward_pre_hooks
