"""Bottlenecks in the place of MLPs or beside them: hand-computed, nothing before training, the base when off, and the arithmetic of halving."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from tasks.rlhf.models import bottleneck, loading
from tasks.rlhf.models.bottleneck import Bottleneck, Form
from tasks.system.errors import InputError
from tests.support import tiny

IDS = torch.tensor([[5, 6, 7, 30, 31, 32]])
FORMS: tuple[Form, ...] = ("replace", "parallel")
NUM_LAYERS, BOTTLENECK_WIDTH = 2, 8
SMALL = 124_439_808  # parameters of GPT-2 small, as published


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def with_bottlenecks(
    model: PreTrainedModel, form: Form, *, whole_layers: bool = False, seed: int = 7
) -> PreTrainedModel:
    """``model`` with bottlenecks of which nothing is zero any more."""
    bottleneck.attach(model, width=BOTTLENECK_WIDTH, form=form, whole_layers=whole_layers)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".mlp.down." in key or ".mlp.up." in key:
                parameter.normal_(std=0.3)
    return model


def trainable(model: PreTrainedModel) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


def inside(model: PreTrainedModel) -> list[Bottleneck]:
    return [module for module in model.modules() if isinstance(module, Bottleneck)]


def gpt2_on_meta(**sizes: int) -> PreTrainedModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(**sizes))


# gelu(2) = 2 Phi(2) = 2 * 0.977249868 = 1.954499736; times (1/2, -1), plus (1/4, 0)
@pytest.mark.parametrize(
    ("form", "expected"), [("replace", (1.227249868, -1.954499736)), ("parallel", (4.227249868, 4.045500264))]
)
def test_a_bottleneck_of_width_1_by_hand(form: Form, expected: tuple[float, float]) -> None:
    mlp = nn.Linear(2, 2, bias=False)
    module = Bottleneck(mlp, hidden_size=2, width=1, form=form, whole_layer=False, num_layers=1)
    with torch.no_grad():
        mlp.weight.copy_(3 * torch.eye(2))
        module.down.weight.copy_(torch.tensor([[1.0, 1.0]]))
        module.down.bias.fill_(-1.0)
        module.up.weight.copy_(torch.tensor([[0.5], [-1.0]]))
        module.up.bias.copy_(torch.tensor([0.25, 0.0]))
    torch.testing.assert_close(
        module(torch.tensor([[[1.0, 2.0]]]))[0, 0], torch.tensor(expected), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS)
def test_every_layer_computes_what_the_formula_says(kind: str, form: Form) -> None:
    model = with_bottlenecks(tiny.model(kind), form)
    seen: list[tuple[Bottleneck, Tensor, Tensor]] = []
    for module in inside(model):
        module.register_forward_hook(lambda at, arguments, output: seen.append((at, arguments[0], output)))
    logits(model)
    assert [at for at, _, _ in seen] == inside(model)
    assert len(seen) == NUM_LAYERS
    for at, x, output in seen:
        z = torch.einsum("btd,wd->btw", x, at.down.weight) + at.down.bias
        expected = torch.einsum("btw,dw->btd", z * (1 + torch.erf(z / 2**0.5)) / 2, at.up.weight) + at.up.bias
        if form == "parallel":
            expected = expected + at.kept(x)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_parallel_bottleneck_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    model = nn.Module.to(tiny.model(kind), dtype)
    assert isinstance(model, PreTrainedModel)
    before = logits(model)
    bottleneck.attach(model, width=BOTTLENECK_WIDTH, form="parallel")
    assert len(inside(model)) == NUM_LAYERS
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS)
def test_off_is_the_base_bit_for_bit(kind: str, form: Form) -> None:
    model = tiny.model(kind)
    before = logits(model)
    with_bottlenecks(model, form)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    with bottleneck.active(model, False) as reference:
        assert torch.equal(logits(reference), before)
        with bottleneck.active(model, True) as policy:
            assert torch.equal(logits(policy), after)
        assert torch.equal(logits(reference), before)
    assert torch.equal(logits(model), after)


def test_an_error_inside_leaves_it_on() -> None:
    model = with_bottlenecks(tiny.model(), "parallel")
    after = logits(model)
    with pytest.raises(RuntimeError), bottleneck.active(model, False):
        raise RuntimeError
    assert torch.equal(logits(model), after)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS)
def test_training_moves_the_bottlenecks_and_nothing_else(kind: str, form: Form) -> None:
    model = tiny.model(kind).requires_grad_(True)
    with_bottlenecks(model, form)
    assert trainable(model) == set()
    chosen = bottleneck.parameters(model)
    assert len(chosen) == 4 * NUM_LAYERS
    assert trainable(model) == set(chosen)
    with bottleneck.active(model, False):
        reference = logits(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(chosen.values(), lr=0.1)
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(chosen)
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(chosen)
    with bottleneck.active(model, False):
        assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_whole_layers_are_all_of_them_but_the_kept_mlps(kind: str) -> None:
    model = with_bottlenecks(tiny.model(kind), "replace", whole_layers=True)
    chosen = bottleneck.parameters(model)
    layers = {key for key, _ in model.named_parameters() if ".0." in key or ".1." in key}
    assert set(chosen) == {key for key in layers if ".kept." not in key}
    assert len(chosen) > 4 * NUM_LAYERS
    assert trainable(model) == set(chosen)
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == set(chosen)
    with pytest.raises(AssertionError, match="the base is gone"), bottleneck.active(model, False):
        pass


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("form", "whole_layers"), [("replace", False), ("parallel", False), ("replace", True)]
)
def test_what_is_saved_comes_back_bit_for_bit(
    kind: str, form: Form, whole_layers: bool, tmp_path: Path
) -> None:
    model = with_bottlenecks(tiny.model(kind), form, whole_layers=whole_layers)
    with torch.no_grad():
        for parameter in bottleneck.parameters(model).values():
            parameter.add_(0.1)
    bottleneck.save(model, tmp_path / "it", base="sha256:1234")
    again = tiny.model(kind)
    bottleneck.load(again, tmp_path / "it")
    assert torch.equal(logits(again), logits(model))
    assert trainable(again) == set()
    assert not again.training
    assert (
        set(bottleneck.parameters(again))
        == set(bottleneck.parameters(model))
        == set(load_file(tmp_path / "it" / bottleneck.WEIGHTS))
    )
    assert bottleneck.belongs_to(tmp_path / "it") == "sha256:1234"
    record = {
        "form": form,
        "width": BOTTLENECK_WIDTH,
        "whole_layers": whole_layers,
        "activation": "gelu",
        "base": "sha256:1234",
    }
    assert json.loads((tmp_path / "it" / bottleneck.CONFIG).read_text()) == record


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = with_bottlenecks(tiny.model(), "parallel")
    for name in ("first", "second"):
        bottleneck.save(model, tmp_path / name, base="sha256:1234")
    for file in (bottleneck.WEIGHTS, bottleneck.CONFIG):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    ("sizes", "whole_layers", "width"),
    [
        # W (2 * 768 + 1) + 768 each, 12 times, in 62 219 904 and in 62 219 904 - 28 385 280
        ({}, False, 3372),
        ({}, True, 1833),
        # GPT-2 medium, D = 1024, 24 layers, 354 823 168 parameters, 4 D^2 + 8 D of attention and norms a layer
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, False, (177_411_584 // 24 - 1024) // 2049),
        (
            {"n_embd": 1024, "n_layer": 24, "n_head": 16},
            True,
            (177_411_584 // 24 - 4 * 1024**2 - 8 * 1024 - 1024) // 2049,
        ),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_half_of_a_real_gpt2_is_trained(
    sizes: dict[str, int], whole_layers: bool, width: int, form: Form
) -> None:
    model = gpt2_on_meta(**sizes)
    total = sum(p.numel() for p in model.parameters())
    assert sizes or total == SMALL
    assert bottleneck.halving_width(model, whole_layers=whole_layers) == width
    bottleneck.attach(model, width=width, form=form, whole_layers=whole_layers)
    trained = sum(p.numel() for p in bottleneck.parameters(model).values())
    one_wider = len(inside(model)) * (2 * model.config.hidden_size + 1)
    assert trained <= total / 2 < trained + one_wider
    assert trained == pytest.approx(total / 2, rel=5e-4)


def test_the_docstrings_arithmetic_of_gpt2_small() -> None:
    model = gpt2_on_meta()
    mlps = sum(p.numel() for key, p in model.named_parameters() if ".mlp." in key)
    assert mlps == 56_669_184
    assert SMALL - mlps == 67_770_624 > SMALL / 2
    bottleneck.attach(model, width=1833, form="replace", whole_layers=True)
    assert (
        sum(p.numel() for p in bottleneck.parameters(model).values())
        == 62_202_348
        == 28_385_280 + 12 * (1833 * (2 * 768 + 1) + 768)
    )


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("whole_layers", [False, True])
def test_half_is_half_of_every_architecture(kind: str, whole_layers: bool) -> None:
    model = tiny.model(kind)
    total = sum(p.numel() for p in model.parameters())
    bottleneck.attach(
        model,
        width=bottleneck.halving_width(model, whole_layers=whole_layers),
        form="parallel",
        whole_layers=whole_layers,
    )
    trained = sum(p.numel() for p in bottleneck.parameters(model).values())
    assert trained <= total / 2 < trained + NUM_LAYERS * (2 * tiny.WIDTH + 1)


@pytest.mark.parametrize("form", FORMS)
def test_a_half_precision_base_gets_fp32_bottlenecks_and_keeps_its_type(form: Form) -> None:
    model = nn.Module.to(tiny.model(), torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    with_bottlenecks(model, form)
    assert {p.dtype for p in bottleneck.parameters(model).values()} == {torch.float32}
    x = torch.randn(1, 3, tiny.WIDTH).bfloat16()
    first = inside(model)[0]
    exact = first.up(functional.gelu(first.down(x.float()))).bfloat16()
    assert torch.equal(first(x), exact if form == "replace" else first.kept(x) + exact)
    assert logits(model).dtype == model.dtype == torch.bfloat16
    loading.check_head(model)


def test_new_parameters_are_where_their_mlp_is() -> None:
    model = gpt2_on_meta(n_embd=32, n_layer=2, n_head=2)
    bottleneck.attach(model, width=4, form="replace")
    assert {p.device.type for p in bottleneck.parameters(model).values()} == {"meta"}


@pytest.mark.parametrize("form", FORMS)
def test_the_start_is_the_documented_one_and_the_seeds(form: Form) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(
            Bottleneck(
                nn.Linear(400, 400), hidden_size=400, width=100, form=form, whole_layer=False, num_layers=8
            )
        )
    first, same, other = made
    assert first.down.weight.std().item() == pytest.approx(1 / 20, rel=0.02)
    assert first.up.weight.std().item() == (
        0 if form == "parallel" else pytest.approx(1 / 40, rel=0.02)
    )  # 1 / sqrt(2 * 8 * 100)
    assert not first.down.bias.any()
    assert not first.up.bias.any()
    assert torch.equal(first.down.weight, same.down.weight)
    assert torch.equal(first.up.weight, same.up.weight)
    assert not torch.equal(first.down.weight, other.down.weight)


def test_a_model_without_mlps_is_refused() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=16,
            word_embed_proj_dim=16,
        )
    )
    for refused in (
        lambda: bottleneck.attach(model, width=4, form="parallel"),
        lambda: bottleneck.halving_width(model),
    ):
        with pytest.raises(InputError, match="opt models have no module named mlp"):
            refused()


def test_half_precision_weights_are_not_trained() -> None:
    model = nn.Module.to(tiny.model(), torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    with pytest.raises(InputError, match=r"cannot be trained in torch\.bfloat16"):
        bottleneck.attach(model, width=4, form="replace", whole_layers=True)
    assert not inside(model)


def test_what_cannot_be_halved_is_refused() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 1, "vocab_size": 8, "n_positions": 8}
    assert bottleneck.halving_width(gpt2_on_meta(**sizes)) > 0
    with pytest.raises(InputError, match="more than half of this gpt2 model"):
        bottleneck.halving_width(gpt2_on_meta(**sizes), whole_layers=True)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "type", "width", "architecture"])
def test_tensors_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    model = with_bottlenecks(tiny.model(), "parallel")
    bottleneck.save(model, tmp_path, base="")
    weights = load_file(tmp_path / bottleneck.WEIGHTS)
    key = next(key for key in weights if key.endswith("up.bias"))
    if damage == "missing":
        del weights[key]
    elif damage == "unknown":
        weights["lm_head.bias"] = torch.zeros(2)
    elif damage == "shape":
        weights[key] = torch.zeros(1)  # would broadcast
    elif damage == "type":
        weights[key] = weights[key].bfloat16()
    elif damage == "width":
        record = json.loads((tmp_path / bottleneck.CONFIG).read_text())
        (tmp_path / bottleneck.CONFIG).write_text(json.dumps(record | {"width": 2 * BOTTLENECK_WIDTH}))
    save_file(weights, tmp_path / bottleneck.WEIGHTS)
    with pytest.raises(InputError, match="do not fit this base"):
        bottleneck.load(tiny.model("gpt2" if damage == "architecture" else "llama"), tmp_path)


@pytest.mark.parametrize("change", [{"form": "serial"}, {"activation": "relu"}])
def test_a_record_of_something_else_is_refused(change: dict[str, str], tmp_path: Path) -> None:
    bottleneck.save(with_bottlenecks(tiny.model(), "parallel"), tmp_path, base="")
    record = json.loads((tmp_path / bottleneck.CONFIG).read_text())
    (tmp_path / bottleneck.CONFIG).write_text(json.dumps(record | change))
    with pytest.raises(InputError, match="not supported"):
        bottleneck.load(tiny.model(), tmp_path)


@pytest.mark.parametrize("file", [bottleneck.WEIGHTS, bottleneck.CONFIG])
def test_a_folder_of_something_else_is_refused(file: str, tmp_path: Path) -> None:
    bottleneck.save(with_bottlenecks(tiny.model(), "parallel"), tmp_path, base="")
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match="holds no bottlenecks"):
        bottleneck.load(tiny.model(), tmp_path)


def test_bottlenecks_are_attached_once() -> None:
    model = with_bottlenecks(tiny.model(), "parallel")
    with pytest.raises(AssertionError, match="already"):
        bottleneck.attach(model, width=4, form="parallel")
