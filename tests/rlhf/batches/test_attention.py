"""Test that several texts in one row are computed as each alone, for every kind of attention."""

import json
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config.jobs import DpoJob, ReferenceJob, RewardJob, SftJob
from tasks.programs import dpo, reference, reward, sft
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import attention_masks, forward, layout_checks, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.packing import IGNORE, Document, block_loss, pack
from tasks.rlhf.models import architecture_checks, lora
from tasks.system.errors import InputError
from tests.support import attention_models, tiny

KINDS = sorted(attention_models.CONFIGS)
NEVER_PACKED = {"falcon_alibi", "bloom", "mpt", "mamba"}
NEVER_SHARED = NEVER_PACKED | {"gpt_neo"}  # its local layers count places in the row
CLOSE = 2e-5  # nats a token
TEXT = {"max_prompt_tokens": 64, "max_answer_tokens": 64}
LORA = {"rank": 2, "alpha": 4.0}


def ids(num: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(100 * num + seed)
    return [rng.randrange(2, tiny.VOCABULARY) for _ in range(num)]


def question(number: int, prompt: int, *answers: int) -> Comparison:
    texts = [[*ids(num, seed=i), tiny.EOS] for i, num in enumerate(answers)]
    return Comparison(number, ids(prompt), texts, [(0, 1)], [1.0], [None])


def documents(*lengths: int) -> list[Document]:
    return [Document(ids(num), [True] * num) for num in lengths]


MIXED = documents(50, 5, 9, 23, 40, 3, 12)  # on both sides of the window
QUESTIONS = [question(0, 40, 20, 5, 12), question(1, 6, 3, 30), question(2, 25, 2, 2, 2, 18)]


def plain(model: PreTrainedModel, text: list[int]) -> Tensor:
    """Return the model's own log-probabilities of a text's tokens except the first."""
    logits: Tensor = model(torch.tensor([text]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def log_probs(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    return forward.output_head(model)(hidden).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_are_those_of_the_models_own_forward(kind: str) -> None:
    model, compared = attention_models.model(kind), 0
    blocks = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)
    gap, told = layout_checks.check_layout(
        model, lambda: layout_checks.packing_gap(model, blocks), layout="Packing"
    )
    assert (told is not None) == (kind in NEVER_PACKED)
    assert gap.nats < CLOSE
    hidden = forward.hidden_states(model, blocks.input_ids, blocks.position_ids)
    for row in range(len(hidden)):
        starts = [*torch.where(blocks.position_ids[row] == 0)[0].tolist(), 100]
        for a, b in pairwise(starts):
            if not (blocks.labels[row, a + 1 : b] == IGNORE).all():
                text = blocks.input_ids[row, a:b]
                own = plain(model, text.tolist())
                torch.testing.assert_close(
                    log_probs(model, hidden[row, a : b - 1], text[1:]), own, atol=CLOSE, rtol=0
                )
                compared += 1
    assert compared == len(MIXED)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shared_prompts_are_those_of_the_models_own_forward(kind: str) -> None:
    model, head = attention_models.model(kind), lora.new_head(tiny.WIDTH)
    measure = partial(layout_checks.sharing_gap, model, QUESTIONS, pad_id=tiny.PAD)
    gap, told = layout_checks.check_layout(model, measure, layout="Sharing")
    assert (told is not None) == (kind in NEVER_SHARED)
    assert gap.nats < CLOSE
    asked = [(c.prompt, c.answers) for c in QUESTIONS]
    batch = shared_prompt.join(asked, pad_id=tiny.PAD, device=tiny.CPU, hidden_size=tiny.WIDTH)
    ours = log_probs(model, shared_prompt.all_hidden_states(model, batch)[batch.before], batch.targets)
    texts = [(prompt, answer) for prompt, answers in asked for answer in answers]
    own = [plain(model, prompt + answer)[len(prompt) - 1 :] for prompt, answer in texts]
    torch.testing.assert_close(ours, torch.cat(own), atol=CLOSE, rtol=0)
    alone = [forward.hidden_states(model, torch.tensor([p + a]))[0, -1] for p, a in texts]
    rewards = head(torch.stack(alone))[:, 0]
    torch.testing.assert_close(shared_prompt.scores(model, head, batch), rewards, atol=CLOSE, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_neo"])
def test_gradients_are_the_same_text_by_text(kind: str) -> None:
    asked = [(c.prompt, c.answers) for c in QUESTIONS]
    blocks = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        model.requires_grad_(True)
        batch = shared_prompt.join(asked, pad_id=tiny.PAD, device=tiny.CPU, hidden_size=tiny.WIDTH)
        loss = block_loss(model, blocks, torch.arange(len(blocks.labels)), tiny.CPU, count=100)
        if kind != "gpt_neo":
            loss = loss + shared_prompt.log_probs(model, batch).sum() / 100
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    apart = attention_models.model(kind)
    attention_masks.use_one_text_per_row(apart)
    for ours, plain_ones in zip(gradients(attention_models.model(kind)), gradients(apart), strict=True):
        torch.testing.assert_close(ours, plain_ones, atol=1e-4 * float(plain_ones.abs().max()), rtol=1e-3)


# ---------------------------------------------------------------------------------------- the guard


def forget_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the mask that replaced the model's."""
    monkeypatch.setattr(attention_masks, "_apply_rule", lambda visible, *_: visible)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "phi3", "gpt_oss", "llama4"])
def test_the_guard_looks_at_the_longest_document(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = documents(*[5] * 20)  # the block with most documents has none as long as a window
    blocks = pack([*documents(60), *short], block_tokens=64, pad_id=tiny.PAD)
    asked = [question(0, 5, 3, 3, 3, 3), question(1, 30, 3, 20)]
    model = attention_models.model(kind)
    assert layout_checks.packing_gap(model, blocks).is_rounding
    assert layout_checks.sharing_gap(model, asked, pad_id=tiny.PAD).is_rounding
    forget_windows(monkeypatch)
    for gap in (
        layout_checks.packing_gap(model, blocks),
        layout_checks.sharing_gap(model, asked, pad_id=tiny.PAD),
    ):
        assert not gap.is_rounding
        assert not gap.is_half_precision_rounding


def test_the_guard_looks_at_all_parts() -> None:
    model = attention_models.model("mistral")
    seen: list[int] = []
    honest = forward.hidden_states
    blocks = [pack(documents(*lengths), block_tokens=64, pad_id=tiny.PAD) for lengths in ((60,), (5, 6, 7))]

    def noting(base: PreTrainedModel, rows: Tensor, *rest: Tensor) -> Tensor:
        seen.append(rows.shape[1])
        return honest(base, rows, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forward, "hidden_states", noting)
        layout_checks.packing_gap(model, *blocks)
    assert {60, 5, 6, 7} <= set(seen)


def test_a_model_that_fails_even_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention_models.model("bloom")
    monkeypatch.setattr(
        attention_masks,
        "forward_one_text_per_row",
        lambda forward, rows, texts, **_: forward(rows).flatten(0, 1),
    )
    blocks = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)
    with pytest.raises(InputError, match="bloom models compute a text differently"):
        layout_checks.check_layout(model, lambda: layout_checks.packing_gap(model, blocks), layout="Packing")


@pytest.mark.parametrize("layout", ["packing", "sharing"])
def test_states_that_are_no_numbers_do_not_pass(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, honest = attention_models.model("llama"), forward.hidden_states

    def broken(base: PreTrainedModel, rows: Tensor, *layouts: Tensor) -> Tensor:
        found = honest(base, rows, *layouts)
        return found * torch.nan if layouts and not attention_masks.has_one_text_per_row(base) else found

    monkeypatch.setattr(forward, "hidden_states", broken)
    monkeypatch.setattr(shared_prompt, "hidden_states", broken)
    blocks = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)
    measures: dict[str, Callable[[], layout_checks.Gap]] = {
        "packing": lambda: layout_checks.packing_gap(model, blocks),
        "sharing": lambda: layout_checks.sharing_gap(model, QUESTIONS, pad_id=tiny.PAD),
    }
    gap, warning = layout_checks.check_layout(model, measures[layout], layout="It")
    assert warning is not None
    assert gap.is_rounding


def test_no_memory_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError

    model = attention_models.model("llama")
    monkeypatch.setattr(forward, "hidden_states", full)
    blocks = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)
    with pytest.raises(torch.OutOfMemoryError):
        layout_checks.check_layout(model, lambda: layout_checks.packing_gap(model, blocks), layout="Packing")


# ---------------------------------------------------------------------------------------- positions


def test_padding_has_no_position_that_no_document_has() -> None:
    model = attention_models.model("gpt2")  # of 128 positions
    blocks = pack(documents(100, 90, 5), block_tokens=256, pad_id=tiny.PAD)
    assert blocks.position_ids.max() == 99
    assert layout_checks.packing_gap(model, blocks).is_rounding


def test_padding_does_not_switch_the_frequencies_of_longrope() -> None:
    model = attention_models.model("phi3_longrope")  # they change after 64 positions
    blocks = pack(documents(20, 30), block_tokens=128, pad_id=tiny.PAD)
    assert layout_checks.packing_gap(model, blocks).is_rounding


@pytest.mark.parametrize(
    ("kind", "most"), [("gpt2", 128), ("opt", 128), ("gpt_neo", 128), ("mpt", 128), ("phi3_longrope", 64)]
)
def test_texts_that_are_too_long_are_refused(kind: str, most: int) -> None:
    model = attention_models.model(kind)
    architecture_checks.check_context(model, most)
    with pytest.raises(
        InputError, match=rf"text.max_prompt_tokens \+ text.max_answer_tokens is {most + 1}, .*{most} tokens"
    ):
        architecture_checks.check_context(model, most + 1)


# ------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize(
    ("kind", "setting"), [("gemma2", {"final_logit_softcapping": 30.0}), ("cohere2", {"logit_scale": 0.99})]
)
def test_logits_that_are_capped_or_scaled_are_refused_however_small(
    kind: str, setting: dict[str, float]
) -> None:
    model = attention_models.model(kind, weight_scale=0.1)
    architecture_checks.check_head(model)
    for name, value in setting.items():
        setattr(model.config, name, value)
        setattr(model, name, value)  # Cohere 2 reads its own
    with pytest.raises(InputError, match=f"{kind} models change their logits after the output head"):
        architecture_checks.check_head(model)


# ----------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data_folder(tmp_path_factory.mktemp("attention") / "data")


def finished(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "artifact" / "summary.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["falcon_alibi", "llama4", "gpt_neo"])
def test_every_stage_trains_such_a_base_and_says_what_is_slower(
    kind: str, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    attention_models.model(kind, weight_scale=1.0).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    common = {"lora": LORA, "max_steps": 2, "batch_size": 2}
    folder = tiny.write_job(
        tmp_path / "sft",
        "sft",
        {"seed": 0, "text": TEXT, "sft": common | {"block_tokens": 256}},
        {"data": data, "base": base},
    )
    run = Run(folder)
    sft.train(SftJob.model_validate(run.record), run)
    assert finished(folder)["metrics"]["sft.packing_leak"] < 1e-4
    warnings = [finished(folder)["warnings"]]
    inputs = {"data": data, "model": base}
    jobs: list[tuple[str, Any, Any, dict[str, Any]]] = [
        ("reward", reward.train, RewardJob, {"reward": common}),
        ("reference", reference.compute, ReferenceJob, {}),
        ("dpo", dpo.train, DpoJob, {"dpo": common}),
    ]
    for stage, program, job, settings in jobs:
        given = {"text": TEXT} | ({"seed": 0} if settings else {}) | settings
        run = Run(tiny.write_job(tmp_path / stage, stage, given, inputs))
        program(job.model_validate(run.record), run)
        warnings.append(finished(tmp_path / stage)["warnings"])
        inputs["reference"] = tmp_path / "reference" / "artifact"
    told = [
        [sentence for sentence in some if "every text is computed alone" in sentence] for some in warnings
    ]
    assert [len(some) for some in told] == {"falcon_alibi": [1, 1, 1, 1], "gpt_neo": [1, 1, 1, 1]}.get(
        kind, [0] * 4
    )
