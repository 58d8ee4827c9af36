"""Bases in every precision: what is quantised, what stays, that adapters train on them and are merged into what they were trained on."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.programs.merge import drift
from tasks.rlhf.algorithms import sanity_checks
from tasks.rlhf.batches import forward
from tasks.rlhf.models import builtin, fingerprint, gradient_checkpointing, loading, lora
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.system.errors import InputError
from tests.support import tiny

# GPT-2 keeps its matrices the other way round, and peft says so
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
IDS = torch.tensor([[5, 6, 7, 30, 31, 32, 40, 41], [9, 8, 7, 6, 5, 4, 3, 2]])
QUANTISED = ("int8", "nf4")
MATRICES = {"llama": 14, "gpt2": 8, "qwen2": 14, "gpt_neox": 8}  # of the two layers


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has instructions for bfloat16, whatever this one has."""
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda: True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of every architecture in float32, and a Llama in bfloat16."""
    place = tmp_path_factory.mktemp("bases")
    made = {kind: tiny.base_folder(place / kind, kind) for kind in tiny.ARCHITECTURES}
    made["half"] = tiny.base_folder(place / "half")
    tiny.model().to(torch.bfloat16).save_pretrained(made["half"])
    return made


def load(folder: Path, precision: Any = None) -> PreTrainedModel:
    return loading.load(folder, device=tiny.CPU, precision=precision)


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def loss(model: PreTrainedModel) -> Tensor:
    """Through the two calls that the programs make."""
    out = forward.output_head(model)(forward.hidden_states(model, IDS[:, :-1]))
    return functional.cross_entropy(out.flatten(0, 1).float(), IDS[:, 1:].flatten())


def with_adapter(base: PreTrainedModel, *, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(3)
    model = lora.attach(
        base, "policy", lora.build_config(rank=4, alpha=8, dropout=dropout, targets="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def gradients(model: PeftModel) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradient of every parameter of the adapter."""
    chosen = lora.parameters(model, "policy")
    with lora.active(model, "policy") as policy:
        value = loss(policy)
        value.backward()
    sanity_checks.check_gradients(chosen)
    return value.item(), {
        name: parameter.grad for name, parameter in chosen.items() if parameter.grad is not None
    }


# ------------------------------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_the_layers_matrices_are_quantised_and_nothing_else(
    kind: str, precision: str, folders: dict[str, Path]
) -> None:
    model = load(folders[kind], precision)
    layer = {"int8": Linear8bitLt, "nf4": Linear4bit}[precision]
    assert sum(isinstance(module, layer) for module in model.modules()) == MATRICES[kind]
    assert type(forward.output_head(model)) is nn.Linear
    assert {p.dtype for p in model.parameters() if p.dtype.is_floating_point} == {torch.float32}
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    loading.check_head(model)
    loading.check_context(model, tiny.CONTEXT)
    assert loading.precision_of(model) == precision


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("nf4", 0.3)])
def test_a_quantised_base_is_near_the_stored_one(
    kind: str, precision: str, most: float, folders: dict[str, Path]
) -> None:
    stored = logits(loading.load(folders[kind], device=tiny.CPU))
    assert torch.equal(logits(load(folders[kind])), stored)
    gap = (logits(load(folders[kind], precision)) - stored).abs().mean() / stored.std()
    assert 0 < gap.item() < most


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16", "float16", *QUANTISED])
def test_the_stored_type_is_kept_unless_another_is_asked_for(
    precision: str | None, folders: dict[str, Path]
) -> None:
    model = load(folders["half"], precision)
    wanted = torch.bfloat16 if precision is None or precision in QUANTISED else getattr(torch, precision)
    assert {p.dtype for p in model.parameters() if p.dtype.is_floating_point} == {wanted}
    assert logits(model).dtype == wanted
    assert fingerprint.compute_fingerprint(folders["half"], model)[2:] == (
        precision or "bfloat16",
        str(wanted)[6:],
    )


@pytest.mark.parametrize("precision", QUANTISED)
def test_the_same_folder_gives_the_same_bytes(precision: str, folders: dict[str, Path]) -> None:
    first, second = load(folders["llama"], precision), load(folders["llama"], precision)
    before = sanity_checks.digest(first.parameters())
    assert torch.equal(logits(first), logits(second))
    assert before == sanity_checks.digest(first.parameters()) == sanity_checks.digest(second.parameters())


@pytest.mark.parametrize("precision", QUANTISED)
def test_rows_and_padding_do_not_change_each_other(precision: str, folders: dict[str, Path]) -> None:
    model = load(folders["llama"], precision)
    with torch.no_grad():
        for norm in (module for name, module in model.named_modules() if name.endswith("input_layernorm")):
            norm.weight.mul_(
                4
            )  # inputs beyond 6, which LLM.int8 treats apart, in every row of the batch where they are in one
    padded = torch.cat([IDS, torch.full((2, 3), tiny.PAD)], dim=1)
    torch.testing.assert_close(logits(model, padded)[:, : IDS.shape[1]], logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model, IDS[:1]), logits(model)[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(30, 45), (34, 77)])
@pytest.mark.parametrize("precision", QUANTISED)
def test_widths_need_not_be_multiples_of_a_block(
    sizes: tuple[int, int], precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = builtin.new_llama(
        vocabulary=64, hidden_size=sizes[0], num_layers=1, num_heads=1, context=64, pad_id=0, eos_id=1
    )
    model.config.intermediate_size = sizes[1]
    type(model)(model.config).save_pretrained(tmp_path)
    assert logits(load(tmp_path, precision)).isfinite().all()


# -------------------------------------------------------------------------------------------------------------- what cannot be loaded


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickled":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "own code":
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}})
        )


@pytest.mark.parametrize("how", ["cut off", "pickled", "no config", "own code"])
@pytest.mark.parametrize("precision", [None, "nf4"])
def test_a_folder_that_cannot_be_loaded_is_told_in_a_sentence(
    how: str, precision: str | None, tmp_path: Path
) -> None:
    damage(tiny.base_folder(tmp_path), how)
    with pytest.raises(
        InputError, match="cannot be loaded as a causal language model in safetensors format"
    ) as told:
        load(tmp_path, precision)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("precision", [None, *QUANTISED])
@pytest.mark.parametrize("there", [False, True])
def test_tensors_that_lack_or_do_not_fit_are_not_made_up(
    precision: str | None, there: bool, tmp_path: Path
) -> None:
    weights = load_file(tiny.base_folder(tmp_path) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights |= {name: weights[name][:-1].clone()} if there else {}
    save_file(
        {key: value for key, value in weights.items() if there or key != name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        InputError,
        match=rf"lacks 1 tensors of its model or has them in another shape, first {re.escape(name)}",
    ):
        load(tmp_path, precision)


@pytest.mark.parametrize("precision", [None, "nf4"])
def test_a_folder_that_is_quantised_already_is_refused(
    precision: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    load(folders["llama"], "nf4").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is quantised already"):
        load(tmp_path, precision)


@pytest.mark.parametrize("absent", ["bitsandbytes", "accelerate"])
def test_what_is_not_installed_is_named(
    absent: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    load(folders["llama"], "bfloat16")
    with pytest.raises(InputError, match=rf"needs {absent}: pip install 'alignflow\[gpu\]'"):
        load(folders["llama"], "int8")


# ----------------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_trains_on_a_quantised_base_and_off_is_the_base(
    kind: str, precision: str, folders: dict[str, Path]
) -> None:
    base = load(folders[kind], precision)
    before, weights = logits(base), sanity_checks.digest(base.parameters())
    torch.manual_seed(0)
    model = lora.attach(base, "policy", lora.build_config(rank=4, alpha=8, dropout=0.0, targets="all-linear"))
    chosen = lora.parameters(model, "policy")
    optimizer = torch.optim.AdamW(chosen.values(), lr=1e-2)
    losses = []
    for _ in range(10):
        with lora.active(model, "policy") as policy:
            if not losses:
                assert torch.equal(logits(policy), before)  # a fresh adapter is a no-op
            value = loss(policy)
            value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 0.3
    with lora.active(model, None) as reference:
        assert torch.equal(logits(reference), before)
    assert sanity_checks.digest(p for name, p in base.named_parameters() if "lora_" not in name) == weights
    assert not any(
        "forward" in vars(m) for m in model.modules() if hasattr(m, "lora_A")
    )  # nothing stays folded in


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_gradients_are_those_of_the_dequantised_weights(
    kind: str, precision: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MERGE_UP_TO", 0)
    quantised = load(folders[kind], precision)
    logits(quantised)  # a forward without gradients must not cost the later ones theirs
    ours = gradients(with_adapter(quantised))
    theirs = gradients(
        with_adapter(loading.load_dequantised(folders[kind], device=tiny.CPU, precision=precision))
    )
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_kernel_that_lets_no_gradient_through_is_off(folders: dict[str, Path]) -> None:
    layers = [module for module in load(folders["llama"], "nf4").modules() if isinstance(module, Linear4bit)]
    assert [module.support_avx512bf16_for_cpu for module in layers] == [False] * 14


# ------------------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, "half"])
@pytest.mark.parametrize("precision", QUANTISED)
def test_the_dequantised_model_computes_what_the_quantised_one_does(
    kind: str, precision: Any, folders: dict[str, Path]
) -> None:
    model = loading.load_dequantised(folders[kind], device=tiny.CPU, precision=precision)
    assert loading.precision_of(model) == ("bfloat16" if kind == "half" else "float32")
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in load(folders[kind]).named_parameters()
    }
    torch.testing.assert_close(
        logits(model), logits(load(folders[kind], precision)), atol=1e-6 if kind != "half" else 0.02, rtol=0
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_int8_weight_is_within_half_a_step_of_the_stored_one(kind: str, folders: dict[str, Path]) -> None:
    stored = dict(load(folders[kind]).named_parameters())
    for name, weight in loading.load_dequantised(
        folders[kind], device=tiny.CPU, precision="int8"
    ).named_parameters():
        largest = stored[name].abs().amax(dim=0 if kind == "gpt2" else -1, keepdim=True)  # of an output's row
        assert ((weight - stored[name]).abs() <= largest * (0.5 / 127 + 1e-3)).all(), (
            name
        )  # it is rounded to float16 first


@pytest.mark.parametrize("precision", [None, "float32", "bfloat16"])
def test_a_base_that_is_not_quantised_is_merged_into_itself(precision: Any, folders: dict[str, Path]) -> None:
    model = loading.load_dequantised(folders["llama"], device=tiny.CPU, precision=precision, dtype="bfloat16")
    assert torch.equal(logits(model), logits(load(folders["llama"], "bfloat16")))


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", QUANTISED)
def test_an_adapter_is_merged_into_what_it_was_trained_on(
    kind: str, precision: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = with_adapter(load(folders[kind], precision))
    lora.save(model, "policy", tmp_path / "adapter", base=tiny.BASE)
    with lora.active(model, "policy") as policy:
        before = logits(policy).flatten(0, 1)
    gaps = []
    for number, target in enumerate(
        [loading.load_dequantised(folders[kind], device=tiny.CPU, precision=precision), load(folders[kind])]
    ):
        adapted, _ = lora.load(target, "merged", tmp_path / "adapter")
        adapted.merge_and_unload(adapter_names=["merged"]).save_pretrained(tmp_path / str(number))
        gaps.append(drift(before, logits(load(tmp_path / str(number))).flatten(0, 1)))
    assert gaps[0]["drift_max"] < 1e-4
    assert gaps[0]["top1_agreement"] == 1
    assert gaps[1]["drift_max"] > 20 * gaps[0]["drift_max"]


# ----------------------------------------------------------------------------------------------------------------- memory for time


def saved_bytes(model: PeftModel) -> int:
    """What the forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    lora.parameters(model, "policy")
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        lora.active(model, "policy") as policy,
    ):
        result = loss(policy)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", *QUANTISED])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit_and_needs_less_memory(
    kind: str, precision: str, dropout: float, folders: dict[str, Path]
) -> None:
    outcomes, sizes = [], []
    for on in (False, True):
        model = with_adapter(load(folders[kind], precision), dropout=dropout)
        if on:
            gradient_checkpointing.enable(model)
        lora.train_mode(model)  # switches the base to eval mode: its dropout stays off
        torch.manual_seed(1)
        outcomes.append(gradients(model))
        sizes.append(saved_bytes(model))
    (plain, theirs), (again, ours) = outcomes
    assert again == plain
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_checkpointing_leaves_dropout_off_and_caches_alone(kind: str, folders: dict[str, Path]) -> None:
    plain, model = load(folders[kind]), load(folders[kind])
    gradient_checkpointing.enable(model)
    assert torch.equal(logits(model), logits(plain))
    model.get_input_embeddings().weight.requires_grad_(True)
    first = model(IDS[:, :4], use_cache=True)  # with gradients on
    second = model(IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    second.logits.sum().backward()
    torch.testing.assert_close(
        torch.cat([first.logits, second.logits], dim=1), logits(plain), atol=1e-5, rtol=0
    )
    assert second.past_key_values.get_seq_length() == IDS.shape[1]


@pytest.mark.parametrize("precision", ["float32", "nf4"])
@pytest.mark.parametrize("then", ["nothing", "critic", "off"])
def test_a_backward_pass_under_another_adapter_is_refused(
    precision: str, then: str, folders: dict[str, Path]
) -> None:
    model = with_adapter(load(folders["llama"], precision))
    lora.attach(model, "critic", lora.build_config(rank=4, alpha=8, dropout=0.0, targets="all-linear"))
    gradient_checkpointing.enable(model)
    lora.parameters(model, "policy")
    with lora.active(model, "policy") as policy:
        value = loss(policy)
    if then == "nothing":
        if precision == "nf4":  # nothing was folded in: the adapter computes the same outside of the block
            value.backward()
        else:
            with pytest.raises(AssertionError, match="backward must be called before"):
                value.backward()
        return
    with lora.active(model, "critic" if then == "critic" else None):
        with pytest.raises(AssertionError, match="backward must be called before"):
            value.backward()


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no layers"):
        gradient_checkpointing.enable(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------- what an adapter belongs to

TRAINED = Fingerprint("sha256:1111111111", "sha256:2222222222", "nf4", "bfloat16")


def test_a_fingerprint_comes_back_from_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    base = fingerprint.compute_fingerprint(folders["llama"], load(folders["llama"], "nf4"))
    assert base == fingerprint.compute_fingerprint(folders["llama"], load(folders["llama"], "nf4"))
    assert base.precision == "nf4"
    fingerprint.save_fingerprint(base, tmp_path)
    assert fingerprint.load_fingerprint(tmp_path) == base
    assert fingerprint.describe_mismatch(fingerprint.load_fingerprint(tmp_path), base, setting="x") is None


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("model.safetensors", "weights"),
        ("tokenizer.json", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("README.md", None),
    ],
)
def test_each_file_counts_where_it_belongs(file: str, field: str | None, tmp_path: Path) -> None:
    model = load(tiny.base_folder(tmp_path))
    before = fingerprint.compute_fingerprint(tmp_path, model)
    with (tmp_path / file).open("ab") as out:
        out.write(b" ")
    after = fingerprint.compute_fingerprint(tmp_path, model)
    assert {name for name in Fingerprint._fields if getattr(before, name) != getattr(after, name)} == (
        {field} if field else set()
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"weights": "sha256:3333333333"},
            r"its base's weights were sha256:11111111 and these are sha256:33333333",
        ),
        (
            {"tokenizer": "sha256:3333333333"},
            r"its tokenizer was sha256:22222222 and this one is sha256:33333333",
        ),
        (
            {"precision": "bfloat16"},
            r"trained on a base in nf4 and this one is in bfloat16 \(set base.precision to nf4\)",
        ),
        ({"compute": "float32"}, r"its base computed in bfloat16 and this one does in float32"),
        (
            {"weights": "x", "precision": "float32", "compute": "float32"},
            r"weights were .*; it was trained on a base in nf4 .* to nf4\)\.$",
        ),
    ],
)
def test_the_sentence_says_what_differs(change: dict[str, str], told: str) -> None:
    sentence = fingerprint.describe_mismatch(TRAINED, TRAINED._replace(**change), setting="base.precision")
    assert sentence is not None
    assert re.search(told, sentence), sentence
    assert sentence.count(";") == len([name for name in change if name != "compute" or len(change) == 1]) - 1


@pytest.mark.parametrize("content", [None, "{", '{"weights": "x"}', "[]"])
def test_an_adapter_without_a_record_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / fingerprint.RECORD).write_text(content)
    with pytest.raises(InputError, match=r"does not say in base\.json"):
        fingerprint.load_fingerprint(tmp_path)


@pytest.mark.parametrize("precision", [None, "bfloat16", "int8", "nf4"])
def test_a_cpu_without_bfloat16_computes_with_the_same_weights_in_float32(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, precision: Any
) -> None:
    half = load(folders["half"], precision)
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda: False)
    single = load(folders["half"], precision)
    assert (half.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    assert loading.stored_dtype(single) == torch.bfloat16
    assert torch.equal(half.get_input_embeddings().weight.float(), single.get_input_embeddings().weight)
    assert fingerprint.compute_fingerprint(folders["half"], half) == fingerprint.compute_fingerprint(
        folders["half"], single
    )  # adapters go from one machine to the other
    exact = logits(single)
    assert exact.dtype == torch.float32
    assert 0 < (logits(half).float() - exact).abs().max() < 0.05 * exact.abs().max()
    whole = logits(loading.load_dequantised(folders["half"], device=tiny.CPU, precision=precision))
    # bitsandbytes unpacks nf4 in the type of the product, and `dequantised` in the stored one
    torch.testing.assert_close(exact, whole, atol=2e-2 if precision == "nf4" else 1e-5, rtol=1e-5)
