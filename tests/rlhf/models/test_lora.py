"""Test several adapters on one base: independent, stored and loaded, and readable by peft."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from tasks.rlhf.batches import sequences
from tasks.rlhf.models import fingerprint, loading, lora
from tasks.system.errors import InputError
from tests.support import tiny

# GPT-2 keeps its matrices the other way round, and peft says so
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
ANSWERS = [[30, 31, 32, 33, tiny.EOS], [40, tiny.EOS]]
IDS = torch.tensor([[5, 6, 7, 30, 31, 32]])


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def with_adapters(base: PreTrainedModel, *names: str, dropout: float = 0.0) -> PeftModel:
    """Return ``base`` with adapters that change its outputs."""
    model: PreTrainedModel | PeftModel = base
    for name in names:
        model = lora.attach(
            model, name, lora.build_config(rank=4, alpha=8, dropout=dropout, targets="all-linear")
        )
    assert isinstance(model, PeftModel)
    torch.manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


def trainable(model: PeftModel) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_adapters_off_is_the_base_bit_for_bit(kind: str) -> None:
    base = tiny.model(kind)
    before = logits(base)
    model = with_adapters(base, "policy", "critic")
    with lora.active(model, "policy") as policy:
        assert not torch.allclose(logits(policy), before, atol=1e-3)
    with lora.active(model, None) as reference:
        assert torch.equal(logits(reference), before)


def test_a_fresh_adapter_changes_nothing() -> None:
    base = tiny.model()
    before = logits(base)
    model = lora.attach(base, "policy", lora.build_config(rank=4, alpha=8, dropout=0.0, targets="all-linear"))
    with lora.active(model, "policy") as policy:
        assert torch.equal(logits(policy), before)


def test_each_name_computes_with_its_own_adapter() -> None:
    model = with_adapters(tiny.model(), "policy", "critic")
    outcomes = []
    for name in ("policy", "critic", "policy", None, "critic"):
        with lora.active(model, name) as base:
            outcomes.append(logits(base))
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[1], outcomes[4])
    assert not torch.equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize(
    "order",
    [("reward", None), ("policy", None), (None, "reward"), ("policy", "reward"), ("reward", "policy", None)],
)
def test_switching_never_changes_what_is_trainable(order: tuple[str | None, ...]) -> None:
    model = with_adapters(tiny.model(), "policy", "reward")
    assert trainable(model) == set()
    wanted = set(lora.parameters(model, "policy"))
    for name in order:
        with lora.active(model, name):
            pass
        assert trainable(model) == wanted


def test_training_one_adapter_leaves_everything_else_alone() -> None:
    model = with_adapters(tiny.model(), "policy", "reward")
    parameters = lora.parameters(model, "policy")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    with lora.active(model, "reward") as base:
        logits(base)
    with lora.active(model, "policy") as policy:
        policy(IDS).logits.square().mean().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(parameters)
    assert all(".policy." in key for key in moved)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_saved_adapter_comes_back_the_same(kind: str, tmp_path: Path) -> None:
    model = with_adapters(tiny.model(kind), "policy")
    lora.save(model, "policy", tmp_path / "adapter", base=tiny.BASE)
    again, score = lora.load(tiny.model(kind), "other", tmp_path / "adapter")
    assert score is None
    assert fingerprint.load_fingerprint(tmp_path / "adapter") == tiny.BASE
    assert trainable(again) == set()
    with lora.active(model, "policy") as ours, lora.active(again, "other") as theirs:
        assert torch.equal(logits(ours), logits(theirs))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model = with_adapters(tiny.model(), "policy")
    for name in ("first", "second"):
        lora.save(model, "policy", tmp_path / name, base=tiny.BASE)
    for file in (lora.WEIGHTS, lora.CONFIG):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    lora.save(with_adapters(tiny.model("gpt2"), "policy"), "policy", tmp_path / "adapter", base=tiny.BASE)
    with pytest.raises(InputError):
        lora.load(tiny.model("llama"), "policy", tmp_path / "adapter")


def test_targets_that_fit_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="fits no module"):
        lora.attach(
            tiny.model(),
            "policy",
            lora.build_config(rank=4, alpha=8, dropout=0.0, targets=("no_such_layer",)),
        )


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("automatic", [False, True])
def test_peft_reads_a_reward_model_and_gives_the_same_scores(
    kind: str, automatic: bool, tmp_path: Path
) -> None:
    tiny.base_folder(tmp_path / "base", kind)
    base = loading.load(tmp_path / "base", device=tiny.CPU)
    model = with_adapters(base, "reward")
    torch.manual_seed(3)
    head = lora.new_head(tiny.WIDTH)
    lora.save(model, "reward", tmp_path / "adapter", base=tiny.BASE, score=head.weight)
    with lora.active(model, "reward") as ours:
        expected = sequences.scores(
            ours, head, sequences.join(PROMPTS, ANSWERS, pad_id=tiny.PAD, device=tiny.CPU)
        )

    if automatic:  # it takes the base's place from the adapter's config
        config = json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())
        (tmp_path / "adapter" / lora.CONFIG).write_text(
            json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
        )
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1)
    else:
        theirs = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1),
            tmp_path / "adapter",
        )
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        with torch.no_grad():
            score = theirs.eval()(torch.tensor([prompt + answer])).logits
        assert score.item() == pytest.approx(expected[row].item(), abs=1e-5)

    _, weight = lora.load(loading.load(tmp_path / "base", device=tiny.CPU), "reward", tmp_path / "adapter")
    assert weight is not None
    assert torch.equal(weight, head.weight)


def test_a_new_head_is_fp32_and_of_the_right_spread() -> None:
    torch.manual_seed(0)
    head = lora.new_head(4095)
    assert (head.weight.dtype, head.weight.shape, head.bias.tolist()) == (torch.float32, (1, 4095), [0.0])
    assert head.weight.std().item() == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_train_mode_is_the_adapters_dropout_and_never_the_bases(kind: str) -> None:
    model = with_adapters(tiny.model(kind), "sft", dropout=0.5)
    lora.train_mode(model)
    with lora.active(model, "sft") as base:
        assert not torch.equal(logits(base), logits(base))
    with lora.active(model, None) as reference:
        assert torch.equal(logits(reference), logits(reference))
    model.eval()
    with lora.active(model, "sft") as base:
        assert torch.equal(logits(base), logits(base))


def test_parameters_of_an_adapter_are_its_own(tmp_path: Path) -> None:
    model = with_adapters(tiny.model(), "policy", "policy2")
    names = set(lora.parameters(model, "policy"))
    assert names
    assert all(".policy." in name for name in names)
    assert isinstance(next(iter(lora.parameters(model, "policy2").values())), nn.Parameter)


def folded(model: PeftModel, name: str) -> list[nn.Module]:
    """Return the layers that compute with one matrix inside the block."""
    with lora.active(model, name):
        return [module for module in model.modules() if "forward" in vars(module)]


def outcome(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and the adapter's gradients."""
    chosen = lora.parameters(model, "policy")
    with lora.active(model, "policy") as policy:
        out = policy(IDS, use_cache=False).logits
        out.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in chosen.items()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    return out.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_one_matrix_or_the_low_rank_path_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = []
    for most, small in ((0, 0), (100, 0), (0, 1 << 18)):
        monkeypatch.setattr(lora, "MERGE_UP_TO", most)
        monkeypatch.setattr(lora, "SMALL_WEIGHT", small)
        model = with_adapters(tiny.model(kind), "policy", "critic")
        assert bool(folded(model, "policy")) == bool(most or small)
        outcomes.append(outcome(model))
    (apart, theirs), *merged = outcomes
    for together, ours in merged:
        torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)
        for key, gradient in theirs.items():
            torch.testing.assert_close(
                ours[key], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3
            )


@pytest.mark.parametrize("inner", [None, "critic"])
def test_blocks_do_not_nest(inner: str | None) -> None:
    model = with_adapters(tiny.model(), "policy", "critic")
    with (
        lora.active(model, "policy"),
        pytest.raises(AssertionError, match="is open"),
        lora.active(model, inner),
    ):
        pass


def test_nothing_of_it_stays_behind() -> None:
    model = with_adapters(tiny.model(), "policy", "critic")
    with pytest.raises(RuntimeError), lora.active(model, "policy"):
        raise RuntimeError
    assert not [module for module in model.modules() if "forward" in vars(module)]
    with pytest.raises(RuntimeError), lora.active(model, None):
        raise RuntimeError
    model.set_adapter("critic")
    expected = logits(model)
    assert not torch.equal(expected, logits(tiny.model()))  # adapters are on again
    with lora.active(model, "policy"):
        pass
    model.set_adapter("critic")
    assert torch.equal(logits(model), expected)


def test_layers_that_an_adapter_adds_later_are_switched_too() -> None:
    model: PreTrainedModel | PeftModel = tiny.model()
    seen = {}
    for name, target in (("narrow", "q_proj"), ("wide", "up_proj")):
        config = lora.build_config(rank=4, alpha=8, dropout=0.0, targets=(target,))
        model = lora.attach(model, name, config)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                torch.nn.init.normal_(parameter)
        with lora.active(model, name) as adapted:
            seen[name] = logits(adapted)
    assert isinstance(model, PeftModel)
    assert not torch.equal(seen["narrow"], seen["wide"])
    with lora.active(model, "narrow") as narrow:
        assert torch.equal(logits(narrow), seen["narrow"])
    with lora.active(model, None) as reference:
        assert torch.equal(logits(reference), logits(tiny.model()))
        assert not any(torch.equal(logits(reference), other) for other in seen.values())


@pytest.mark.parametrize("kind", ["gpt2", "half precision", "dropout", "large"])
def test_where_it_would_be_wrong_or_slower_the_low_rank_path_is_taken(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "SMALL_WEIGHT", 0)
    model = with_adapters(
        tiny.model("gpt2" if kind == "gpt2" else "llama"), "policy", dropout=0.1 if kind == "dropout" else 0.0
    )
    if kind == "half precision":
        model.get_base_model().to(torch.bfloat16)
    if kind == "large":
        model = lora.attach(
            tiny.model(), "policy", lora.build_config(rank=1, alpha=1, dropout=0.0, targets="all-linear")
        )
    assert len(folded(model, "policy")) == {"dropout": 14, "large": 4}.get(
        kind, 0
    )  # keys and values are small enough even with rank 1
    if kind == "dropout":
        lora.train_mode(model)
        assert folded(model, "policy") == []
