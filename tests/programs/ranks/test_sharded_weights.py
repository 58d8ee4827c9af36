"""Test sharded weights: only the first rank reads them, and matrices are gathered in the type of the products
that they are in.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.rlhf.compute import fsdp
from tests.programs.ranks.test_distributed import start
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with torchrun's agent"),
]

# Each rank loads the whole model too, to compare with; other ranks are refused it while it is loaded sharded.
LOADED_ONCE = """
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.programs.runtime import training_setup
from tasks.rlhf.algorithms.sanity_checks import digest
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import gradient_checkpointing, loading, lora, quantised
from tests.support import tiny

ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))

def load(folder, precision, on_cpu):
    assert distributed.is_first(), "another rank reads the weights"
    model = loading.load(folder, device=tiny.CPU, precision=precision, on_cpu=on_cpu)
    gradient_checkpointing.enable(model)
    return model

def logits(model):
    return model(ids, use_cache=False).logits

def refuse(*_):
    raise ValueError

with distributed.process_group():
    for kind, precision in (argument.split("=") for argument in sys.argv[2:]):
        folder, precision = Path(sys.argv[1]) / kind, precision or None
        whole = loading.load(folder, device=tiny.CPU, precision=precision)
        parts = training_setup.load_sharded(partial(load, folder, precision), tiny.CPU)
        assert type(parts).__mro__[2] is type(whole)
        assert all(isinstance(p, DTensor) for p in parts.parameters())
        assert [name for name, _ in parts.named_parameters()] == [n for n, _ in whole.named_parameters()]
        assert digest(parts.parameters()) == digest(whole.parameters())
        buffers = dict(parts.named_buffers())
        for name, buffer in whole.named_buffers():
            assert torch.equal(buffers[name], buffer), name
        assert loading.precision_of(parts) == loading.precision_of(whole)
        assert parts.config == whole.config
        layers = [x for x in parts.modules() if isinstance(x, GradientCheckpointingLayer)]
        assert len(layers) == 2
        assert all(vars(layer)["forward"].args[0] is layer for layer in layers)  # it computes with its own
        with torch.no_grad():
            refusing = layers[1].register_forward_pre_hook(refuse)
            try:
                fsdp.with_full_weights(parts, logits)
            except ValueError:
                refusing.remove()
            assert all(isinstance(p, DTensor) for p in parts.parameters())  # none is left gathered
            assert torch.equal(fsdp.with_full_weights(parts, logits), logits(whole)), kind
        adapter = lora.build_config(rank=2, alpha=4, dropout=0.0, targets="all-linear")
        torch.manual_seed(0)
        one = lora.attach(whole, "a", adapter)
        torch.manual_seed(0)
        many = lora.attach(parts, "a", adapter)  # peft reads attributes of quantised weights
        found = []
        for model, compute in ((one, logits), (many, partial(fsdp.with_full_weights, compute=logits))):
            trained = lora.parameters(model, "a")
            with lora.active(model, "a") as active:
                compute(active).square().mean().backward()
            found.append([p.grad for p in trained.values()])
        for wanted, grad in zip(*found, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
os._exit(0)  # as programs do
"""


def test_the_first_rank_alone_reads_weights_that_are_sharded(tmp_path: Path) -> None:
    for kind in tiny.ARCHITECTURES:
        tiny.base_folder(tmp_path / "models" / kind, kind)
    (tmp_path / "loaded_once.py").write_text(LOADED_ONCE)
    cases = [f"{kind}=" for kind in tiny.ARCHITECTURES]
    cases += [f"{kind}={precision}" for kind in ("llama", "qwen2") for precision in ("nf4", "int8")]
    agent = start(tmp_path, str(tmp_path / "loaded_once.py"), str(tmp_path / "models"), *cases)
    assert agent.wait(900) == 0, (tmp_path / "log.txt").read_text()[-4000:]


# Masters are no bfloat16 numbers. The sum of two gradients does not depend on their order: all is bit-equal.
GATHERED_IN_BFLOAT16 = """
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.batches import chunked_log_probs, forward
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import gradient_checkpointing, trainable
from tests.support import tiny

ids = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(1))

def loss(model, rows):
    hidden = forward.hidden_states(model, ids[rows])[:, :-1].flatten(0, 1)
    targets = ids[rows][:, 1:].flatten()
    return chunked_log_probs.cross_entropy(hidden, forward.output_head(model), targets, count=76)

with distributed.process_group():
    rows, folder = slice(distributed.rank(), None, 2), Path()
    for kind in tiny.ARCHITECTURES:
        alone, parts = (tiny.model(kind).bfloat16() for _ in range(2))
        if kind in ("llama", "gpt2"):
            gradient_checkpointing.enable(parts)
        one = trainable.unfreeze_all(alone, folder)
        many = trainable.unfreeze_all(trainable.shard_trained(parts, tiny.CPU), folder)
        assert fsdp.compute_dtype(parts) == torch.bfloat16
        assert parts.dtype == alone.dtype == torch.float32
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, p in one.parameters.items():
                p.add_(torch.randn(p.shape, generator=generator) / 100)
                many.parameters[name].copy_(fsdp.shard_like(p, many.parameters[name]))
        seen = []
        for layer in parts.modules():
            if type(layer) in (nn.Linear, Conv1D) and layer is not parts.get_output_embeddings():
                layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))
        with one.active() as model:
            wanted = loss(model, rows)
            wanted.backward()
        with torch.no_grad():  # without autocast around it, as checks before training call it
            assert torch.equal(fsdp.with_full_weights(parts, loss, rows), wanted), kind
        with many.active() as model:
            found = fsdp.with_full_weights(model, loss, rows)
            found.backward()
        assert torch.equal(found, wanted), kind
        assert set(seen) == {torch.bfloat16} and len(seen) >= 8
        distributed.sum_gradients(many.parameters.values())
        for name, p in one.parameters.items():
            dist.all_reduce(p.grad)
            sharded = many.parameters[name]
            of_layer = "layers." in name or ".h." in name
            is_norm = of_layer and ("norm" in name or ".ln_" in name)
            assert isinstance(sharded, DTensor) == (not is_norm), name
            gradient = fsdp.full_tensor(sharded.grad)
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, p.grad), (kind, name, (gradient - p.grad).abs().max())
os._exit(0)  # as programs do
"""


def test_matrices_gathered_in_bfloat16_give_the_bits_of_autocast(tmp_path: Path) -> None:
    (tmp_path / "gathered.py").write_text(GATHERED_IN_BFLOAT16)
    agent = start(tmp_path, str(tmp_path / "gathered.py"))
    assert agent.wait(900) == 0, (tmp_path / "log.txt").read_text()[-4000:]


def test_layers_with_weights_outside_linear_layers_are_gathered_in_float32() -> None:
    layer = nn.ModuleDict({"up": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})
    policy, whole = fsdp._precision_of_gathers(layer, torch.bfloat16)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert whole == set(layer["norm"].parameters())
    assert fsdp._precision_of_gathers(layer, torch.float32)[0].param_dtype is None
    layer.experts = nn.Parameter(torch.zeros(2, 3, 3))
    policy, whole = fsdp._precision_of_gathers(layer, torch.bfloat16)
    assert (policy.param_dtype, whole) == (None, set())
