"""Run benchmarks through lm-eval, the Language Model Evaluation Harness (package lm-eval, 0.4.13).

Documents are handed over in memory and nothing is downloaded. A multiple-choice question is answered by the
choice with the greatest log-likelihood after the question: by itself for acc, divided by the choice's
characters for acc_norm. A continuation is right if it is what the model would choose greedily.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.system.errors import InputError

Kind = Literal["multiple_choice", "continuation"]
OUTPUT_TYPES: dict[Kind, str] = {"multiple_choice": "multiple_choice", "continuation": "loglikelihood"}
METRICS: dict[Kind, tuple[str, ...]] = {"multiple_choice": ("acc", "acc_norm"), "continuation": ("acc",)}
EXAMPLES_SEED = 1234  # of lm-eval's command line


class Document(TypedDict):
    """A question: a text, its possible continuations, and the index of the right one."""

    text: str
    choices: list[str]
    gold: int


class Result(NamedTuple):
    """What a model answered to a document."""

    log_likelihoods: list[float]  # of each choice, in nats
    acc: float
    acc_norm: float | None  # multiple choice only
    is_cut: bool  # it is longer than the model's context and lost its beginning


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    kind: Kind,
    examples: Sequence[Document],
    num_fewshot: int,
    batch_size: int,
    report_progress: Callable[[int, int], None],
) -> list[Result]:
    """Return the model's answer to each document, after ``num_fewshot`` of the solved ``examples``."""
    library = _import_lm_eval()
    lm = library.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32
    )
    lm.loglikelihood = partial(lm.loglikelihood, disable_tqdm=True)
    task = library.ConfigurableTask(config=_task_config(documents, kind, examples, num_fewshot))
    task.set_fewshot_seed(EXAMPLES_SEED)
    _check_choices(documents, lm)
    total = sum(len(document["choices"]) for document in documents)
    hook = _count_rows(model, total, report_progress)
    try:
        found = library.evaluate(lm=lm, task_dict={"benchmark": task}, bootstrap_iters=0, log_samples=True)
    finally:
        hook.remove()
    samples = sorted(found["samples"]["benchmark"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(documents)
    return [_result(sample, lm) for sample in samples]


class _Library(NamedTuple):
    """The parts of lm-eval that are used."""

    HFLM: Any
    ConfigurableTask: Any
    evaluate: Any


def _import_lm_eval() -> _Library:
    """Import lm-eval, quiet and without a network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(
            f"Benchmarks need lm-eval on the machine that runs them ({error}): pip install "
            "'alignflow[benchmarks]'."
        ) from error
    return _Library(HFLM, ConfigurableTask, evaluate)


def _task_config(
    documents: Sequence[Document], kind: Kind, examples: Sequence[Document], num_fewshot: int
) -> dict[str, Any]:
    """Return lm-eval's description of a task on documents in memory."""
    from datasets import Dataset

    splits = {"test": Dataset.from_list(list(documents))}
    if num_fewshot:
        splits["examples"] = Dataset.from_list(list(examples))
    config: dict[str, Any] = {
        "task": "benchmark",
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "output_type": OUTPUT_TYPES[kind],
        "doc_to_text": lambda document: document["text"],
        "target_delimiter": " ",
        "num_fewshot": num_fewshot,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS[kind]
        ],
    }
    if num_fewshot:
        config["fewshot_split"] = "examples"
    if kind == "multiple_choice":
        return config | {
            "doc_to_choice": lambda document: document["choices"],
            "doc_to_target": lambda document: document["gold"],
        }
    return config | {"doc_to_target": _continuation, "target_delimiter": ""}


def _continuation(document: Document) -> str:
    """Return the continuation with the space before it, which lm-eval puts before choices only."""
    text = document["choices"][0]
    return text if document["text"][-1:].isspace() or text[:1].isspace() else f" {text}"


def _count_rows(model: nn.Module, total: int, report_progress: Callable[[int, int], None]) -> Any:
    """Report the rows that the model has computed after each of its calls; return the hook's handle."""
    done = 0

    def count(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - a hook's arguments
        nonlocal done
        done = min(done + len(inputs[0]), total)
        report_progress(done, total)

    return model.register_forward_hook(count)


def _result(sample: dict[str, Any], lm: Any) -> Result:
    log_likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    acc_norm = float(sample["acc_norm"]) if "acc_norm" in sample else None
    longest = max(len(lm.tok_encode(context + choice)) for context, choice in sample["arguments"])
    return Result(log_likelihoods, float(sample["acc"]), acc_norm, is_cut=longest > lm.max_length + 1)


def _check_choices(documents: Sequence[Document], lm: Any) -> None:
    """Refuse a choice that is longer than the model's context, which lm-eval cannot cut.

    Raises InputError.
    """
    for document in documents:
        longest = max(len(lm.tok_encode(choice)) for choice in document["choices"])
        if longest >= lm.max_length:
            raise InputError(
                f"A benchmark has an answer of {longest} tokens, and the model reads {lm.max_length} at a "
                f"time: leave it out. It begins with {document['choices'][0][:60]!r}."
            )
