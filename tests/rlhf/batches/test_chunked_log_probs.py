"""Test chunked log_probs and cross-entropy: values, gradients, and that all logits never exist at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tasks.rlhf.batches import chunked_log_probs
from tasks.rlhf.batches.chunked_log_probs import chunk_rows, cross_entropy, log_probs
from tasks.rlhf.training.dry_run import _AliveBytes

N, D, V = 13, 6, 11


def head(
    *,
    bias: bool = False,
    trains: bool = False,
    dtype: torch.dtype = torch.float64,
    vocabulary: int = V,
    width: int = D,
) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(trains)


def batch(
    dtype: torch.dtype = torch.float64, num: int = N, width: int = D, vocabulary: int = V
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, targets, and a weight for each log-probability."""
    torch.manual_seed(4)
    return (
        2 * torch.randn(num, width, dtype=dtype),
        torch.randint(vocabulary, (num,)),
        torch.randn(num, dtype=dtype),
    )


def outcome(made: Callable[[Tensor], Tensor], hidden: Tensor, layer: nn.Module) -> list[Tensor]:
    """Return the value and its gradients with respect to the hidden states and the head's trained
    parameters.
    """
    x = hidden.clone().requires_grad_(True)
    value = made(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [value.detach(), *torch.autograd.grad(value, wanted)]


def both(
    layer: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    chunk: int | None,
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """Return outcomes of the chunked losses beside those of torch's cross_entropy.

    (cross entropy, plain, log-probabilities, plain)
    """

    def plain(x: Tensor) -> Tensor:
        logits = layer(x)
        return F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature,
            targets,
            reduction="none",
        )

    return [
        outcome(lambda x: cross_entropy(x, layer, targets, count=40, chunk=chunk), hidden, layer),
        outcome(
            lambda x: F.cross_entropy(layer(x).double(), targets, reduction="sum").to(weights.dtype) / 40,
            hidden,
            layer,
        ),
        outcome(
            lambda x: (log_probs(x, layer, targets, temperature=temperature, chunk=chunk) * weights).sum(),
            hidden,
            layer,
        ),
        outcome(lambda x: (-plain(x) * weights).sum(), hidden, layer),
    ]


# ------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, N, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_torchs(
    trains: bool, bias: bool, chunk: int | None, temperature: float
) -> None:
    entropy, plain_entropy, chosen, plain_chosen = both(
        head(bias=bias, trains=trains), *batch(), chunk=chunk, temperature=temperature
    )
    assert len(entropy) == len(chosen) == 2 + trains * (1 + bias)
    torch.testing.assert_close(entropy, plain_entropy, atol=1e-10, rtol=0)
    torch.testing.assert_close(chosen, plain_chosen, atol=1e-10, rtol=0)


def test_log_probs_by_hand() -> None:
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[0.0], [1.0]])
    layer.requires_grad_(False)
    hidden = torch.tensor([[0.0], [2.0]], requires_grad=True)
    made = log_probs(hidden, layer, torch.tensor([0, 1]), temperature=2.0)
    assert made.tolist() == pytest.approx([-0.693147, -0.313262], abs=1e-6)  # log 1/2; log sigmoid(2 / 2)
    (gradient,) = torch.autograd.grad(made, hidden, torch.tensor([1.0, 10.0]))
    assert gradient[:, 0].tolist() == pytest.approx(
        [-0.25, 5 * 0.268941], abs=1e-5
    )  # (W[target] - mean W) / 2, times what comes from above


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_pass_gradcheck(trains: bool) -> None:
    layer = head(bias=True, trains=trains)
    hidden, targets, _ = batch()
    inputs = [hidden.requires_grad_(True), *(p for p in layer.parameters() if p.requires_grad)]
    assert torch.autograd.gradcheck(
        lambda *_: log_probs(hidden, layer, targets, temperature=1.3, chunk=5), inputs
    )
    assert torch.autograd.gradcheck(
        lambda *_: cross_entropy(hidden, layer, targets, count=7.0, chunk=5), inputs
    )


def test_the_chunk_changes_nothing_beyond_rounding() -> None:
    layer = head(trains=True, dtype=torch.float32, vocabulary=300)
    hidden, targets, weights = batch(torch.float32, num=97, vocabulary=300)
    one = both(layer, hidden, targets, weights, chunk=97)
    for chunk in (1, 10, 64, 1000):
        torch.testing.assert_close(
            both(layer, hidden, targets, weights, chunk=chunk), one, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_heads_round_their_inputs_and_not_their_sums(trains: bool, bias: bool) -> None:
    layer = head(dtype=torch.bfloat16, width=64, vocabulary=500, trains=trains, bias=bias)
    hidden, targets, weights = batch(torch.bfloat16, num=200, width=64, vocabulary=500)
    for made, plain in zip(*[iter(both(layer, hidden, targets, weights.float(), chunk=16))] * 2, strict=True):
        assert [x.dtype for x in made[:2]] == [torch.float32, torch.bfloat16]
        for x, y in zip(made, plain, strict=True):
            assert (x - y).float().norm() < 0.01 * y.float().norm()
    assert log_probs(hidden, layer, targets, chunk=16).dtype == torch.float32


def test_large_logits_stay_finite() -> None:
    hidden, targets, _ = batch(torch.float32)
    made = outcome(
        lambda x: log_probs(1e4 * x, head(dtype=torch.float32), targets, chunk=4).sum(), hidden, head()
    )
    assert all(x.isfinite().all() for x in made)


# -------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("trains", [False, True])
def test_without_gradients(trains: bool) -> None:
    layer = head(trains=trains)
    hidden, targets, _ = batch()
    hidden.requires_grad_(True)
    with torch.no_grad():
        values, loss = (
            log_probs(hidden, layer, targets, chunk=4),
            cross_entropy(hidden, layer, targets, count=2, chunk=4),
        )
    assert not values.requires_grad
    assert not loss.requires_grad
    torch.testing.assert_close(values, -F.cross_entropy(layer(hidden), targets, reduction="none").detach())
    torch.testing.assert_close(loss, -values.sum() / 2)


def test_a_head_that_trains_alone() -> None:
    layer = head(trains=True, bias=True)
    hidden, targets, _ = batch()
    for made in (
        cross_entropy(hidden, layer, targets, count=1, chunk=4),
        (-log_probs(hidden, layer, targets, chunk=4)).sum(),
    ):
        plain = F.cross_entropy(layer(hidden), targets, reduction="sum")
        wanted = list(layer.parameters())
        torch.testing.assert_close(torch.autograd.grad(made, wanted), torch.autograd.grad(plain, wanted))


@pytest.mark.parametrize("trains", [False, True])
def test_no_rows(trains: bool) -> None:
    layer = head(trains=trains, bias=True)
    hidden, targets, weights = batch(num=0)
    for made in both(layer, hidden, targets, weights, chunk=None)[::2]:
        assert made[0].item() == 0
        assert [x.abs().sum().item() for x in made[1:]] == [0.0] * len(made[1:])
    assert log_probs(hidden, layer, targets).shape == (0,)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("trains", [False, True])
def test_the_same_twice_and_a_graph_used_twice(trains: bool) -> None:
    layer = head(trains=trains, dtype=torch.float32)
    hidden, targets, weights = batch(torch.float32)
    first, second = (both(layer, hidden, targets, weights, chunk=4) for _ in range(2))
    for a, b in zip(chain(*first), chain(*second), strict=True):
        assert torch.equal(a, b)
    x = hidden.requires_grad_(True)
    for loss in (
        cross_entropy(x, layer, targets, count=3, chunk=4),
        log_probs(x, layer, targets, chunk=4).sum(),
    ):
        (once,) = torch.autograd.grad(loss, x, retain_graph=True)
        (twice,) = torch.autograd.grad(2 * loss, x)
        torch.testing.assert_close(twice, 2 * once)


def test_a_head_with_an_adapter() -> None:
    layer = LoraLinear(head(), "default", config=LoraConfig(r=2), r=2, lora_alpha=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer = layer.double()
    hidden, targets, weights = batch()
    entropy, plain_entropy, chosen, plain_chosen = both(layer, hidden, targets, weights, chunk=4)
    assert len(entropy) == 4  # the value, the hidden states, A and B
    torch.testing.assert_close(entropy, plain_entropy)
    torch.testing.assert_close(chosen, plain_chosen)


def test_dropout_before_a_head_falls_the_same_way_in_both_passes() -> None:
    layer = LoraLinear(
        head(), "default", config=LoraConfig(r=2, lora_dropout=0.5), r=2, lora_alpha=2, lora_dropout=0.5
    )
    nn.init.normal_(layer.lora_B["default"].weight)
    layer = layer.double().train()
    hidden, targets, _ = batch()
    torch.manual_seed(0)
    made = outcome(lambda x: log_probs(x, layer, targets, chunk=4).sum(), hidden, layer)
    torch.manual_seed(0)
    plain = outcome(
        lambda x: torch.cat(
            [
                chunked_log_probs._chunk_log_probs(h, layer, t, 1.0)
                for h, t in zip(x.split(4), targets.split(4), strict=True)
            ]
        ).sum(),
        hidden,
        layer,
    )
    torch.testing.assert_close(made, plain)


# ------------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """A dispatch mode that records the size of the largest tensor that any operation creates."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel())
        return made


@contextmanager
def largest(expected: int) -> Iterator[None]:
    with Largest() as seen:
        yield
    assert seen.size == expected


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_no_more_than_a_chunk_of_logits_is_ever_made(
    trains: bool, dtype: torch.dtype, gradients: bool
) -> None:
    num, width, vocabulary, chunk = 64, 4, 1000, 8
    layer = head(trains=trains, dtype=dtype, width=width, vocabulary=vocabulary)
    hidden, targets, _ = batch(dtype, num, width, vocabulary)
    hidden.requires_grad_(True)
    for made in (
        lambda: cross_entropy(hidden, layer, targets, count=9, chunk=chunk),
        lambda: log_probs(hidden, layer, targets, chunk=chunk).sum(),
    ):
        with largest(chunk * vocabulary), torch.set_grad_enabled(gradients):
            loss = made()
            if gradients:
                loss.backward()


@pytest.mark.parametrize("trains", [False, True])
def test_no_two_chunks_of_logits_are_alive_at_a_time(trains: bool) -> None:
    num, width, vocabulary, chunk = 64, 4, 1000, 8
    layer = head(trains=trains, dtype=torch.float32, width=width, vocabulary=vocabulary)
    hidden, targets, _ = batch(torch.float32, num, width, vocabulary)
    for made in (
        lambda x: cross_entropy(x, layer, targets, count=9, chunk=chunk),
        lambda x: log_probs(x, layer, targets, chunk=chunk).sum(),
    ):
        with _AliveBytes(answer=True) as alive:
            made(hidden.requires_grad_(True)).backward()
        one = 4 * chunk * vocabulary
        gradients = 4 * vocabulary * width * (2 if trains else 0)
        assert alive.most < 2 * one + gradients + 4 * num * width * 3 + 4096  # logits and their log-softmax


def test_with_a_frozen_head_nothing_is_computed_twice_and_little_waits() -> None:
    layer = head(dtype=torch.float32, vocabulary=1000)
    hidden, targets, _ = batch(torch.float32, vocabulary=1000)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        loss = cross_entropy(hidden.requires_grad_(True), layer, targets, count=1, chunk=4)
    assert sum(x.numel() for x in kept) < N * D + 10
    with largest(N * D):
        loss.backward()


def test_the_default_chunk_keeps_to_a_budget() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunk_rows(1500, 4096, device=cpu) == 1500  # 25 MB of logits: one chunk
    assert chunk_rows(8192, 4096, device=cpu) == 4096  # two of exactly 64 MiB
    assert chunk_rows(2048, 49152, device=cpu) == 293  # 7 of like size; 341 fit
    assert chunk_rows(2048, 49152, device=cuda) == 1024
    assert chunk_rows(2048, 10**6, device=cpu) == 64  # never fewer
    assert chunk_rows(0, 4096, device=cpu) == 1
    assert chunk_rows(10, 4096, device=cpu, chunk=4) == 4
    for num in range(1, 200):
        rows = chunk_rows(num, 100, device=cpu, chunk=17)
        assert rows <= 17
        assert -(-num // rows) == -(-num // 17)
