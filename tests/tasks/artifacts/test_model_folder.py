"""Test that a model's folder is consistent: tokenizer and embeddings, and no adapter beside the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.artifacts.base_model import check_model_folder
from tasks.config.jobs import (
    AnswersJob,
    BenchmarksJob,
    DpoJob,
    MergeJob,
    PpoJob,
    ReferenceJob,
    RewardJob,
    SftJob,
    WinrateJob,
)
from tasks.programs import answers, benchmarks, dpo, merge, ppo, reference, reward, sft, winrate
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import loading, lora
from tasks.system.errors import InputError
from tests.support import tiny

ONE_MORE = (
    r"has 1 tokens without an embedding, first '<\|im_start\|>' with the id 320, and the model has 320 "
    r"embeddings: .*resize_token_embeddings"
)
PROGRAMS: list[tuple[str, Callable[[Any, Run], None], Any]] = [
    ("sft", sft.train, SftJob),
    ("merge", merge.merge, MergeJob),
    ("reward", reward.train, RewardJob),
    ("reference", reference.compute, ReferenceJob),
    ("dpo", dpo.train, DpoJob),
    ("ppo", ppo.train, PpoJob),
    ("answers", answers.answer, AnswersJob),
    ("winrate", winrate.evaluate, WinrateJob),
    ("benchmarks", benchmarks.measure, BenchmarksJob),
]


def add(tokenizer: PreTrainedTokenizerBase, what: str) -> PreTrainedTokenizerBase:
    """Add one more token to the tokenizer than the model has embeddings."""
    if what == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    elif what == "plain":
        tokenizer.add_tokens(["<|im_start|>"])
    else:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == tiny.VOCABULARY + 1
    return tokenizer


def folder_with(tmp_path: Path, what: str) -> Path:
    folder = tiny.base_folder(tmp_path / "base")
    add(tiny.tokenizer(), what).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", ["special", "plain"])
def test_a_token_without_an_embedding_is_refused_before_anything_runs(tmp_path: Path, what: str) -> None:
    folder = folder_with(tmp_path, what)
    for refusing in (loading.load_tokenizer, check_model_folder):
        with pytest.raises(InputError, match=ONE_MORE):
            refusing(folder)


def test_a_token_of_the_vocabulary_itself_is_one_too(tmp_path: Path) -> None:
    folder = tiny.base_folder(tmp_path / "base")
    pieces = [
        ("<pad>", 0.0),
        ("<eos>", 0.0),
        ("<unk>", 0.0),
        *((f"w{i}", -1.0) for i in range(tiny.VOCABULARY - 2)),
    ]
    raw = Tokenizer(Unigram(pieces, unk_id=2))
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    for refusing in (loading.load_tokenizer, check_model_folder):
        with pytest.raises(
            InputError, match="has 1 tokens without an embedding, first 'w317' with the id 320"
        ):
            refusing(folder)


def test_added_tokens_in_a_file_of_their_own_count(tmp_path: Path) -> None:
    folder = tiny.base_folder(tmp_path / "base")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 320}))
    with pytest.raises(InputError, match=ONE_MORE):
        check_model_folder(folder)


@pytest.mark.parametrize(("stage", "program", "job"), PROGRAMS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_stage_refuses_it(
    stage: str, program: Callable[[Any, Run], None], job: Any, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, "special")
    inputs = {
        "base": folder,
        "model": folder,
        "data": tiny.data_folder(tmp_path / "data", 4),
        "adapter": tmp_path,
        "reward": tmp_path,
    }
    settings = {"seed": 0, "text": {}, "source": {"kind": "shell-site"}, "winrate": {}, stage: {}}
    run = Run(tiny.write_job(tmp_path / stage, stage, {}, inputs))
    with pytest.raises(InputError, match=ONE_MORE):
        program(
            job.model_validate({name: value for name, value in settings.items() if name in job.model_fields}),
            run,
        )


def test_a_pad_token_without_an_embedding_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_with(tmp_path, "pad")
    check_model_folder(folder)
    tokenizer = loading.load_tokenizer(folder)
    assert "The pad token '[PAD]'" in capsys.readouterr().out
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tiny.EOS
    ids = tokenizer("A post about [PAD] tokens.")["input_ids"]
    assert max(ids) < tiny.VOCABULARY
    assert tokenizer.decode(ids) == "A post about [PAD] tokens."
    tokenizer.save_pretrained(folder)  # as merge does: the next stage reads that
    again = loading.load_tokenizer(folder)
    assert again.pad_token_id == tiny.EOS
    assert again("A post about [PAD] tokens.")["input_ids"] == ids
    check_model_folder(folder)


def test_more_embeddings_than_tokens_are_usual(tmp_path: Path) -> None:
    folder = tiny.base_folder(tmp_path / "base")
    model = tiny.model()
    model.resize_token_embeddings(384, mean_resizing=False)
    model.save_pretrained(folder)
    assert len(loading.load_tokenizer(folder)) == tiny.VOCABULARY
    check_model_folder(folder)


def test_a_tokenizer_that_was_resized_for_is_taken(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "special")
    model = tiny.model()
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    model.save_pretrained(folder)
    assert len(loading.load_tokenizer(folder)) == tiny.VOCABULARY + 1
    check_model_folder(folder)


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_in_a_models_folder_is_refused(tmp_path: Path, beside: bool) -> None:
    base = tiny.base_folder(tmp_path / "base")
    folder = tiny.base_folder(tmp_path / "given")
    model = lora.attach(
        tiny.model(), "x", lora.build_config(rank=2, alpha=4, dropout=0, targets="all-linear")
    )
    with torch.no_grad():
        for parameter in lora.parameters(model, "x").values():
            parameter.normal_()
    model.save_pretrained(folder, selected_adapters=["x"])
    for path in (folder / "x").iterdir():
        path.rename(folder / path.name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    if not beside:
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink()
    for refusing in (
        check_model_folder,
        loading.load_config,
        lambda place: loading.load(place, device=tiny.CPU),
    ):
        with pytest.raises(
            InputError, match=r"holds an adapter \(adapter_config.json\).*merge it into its base first"
        ):
            refusing(folder)
