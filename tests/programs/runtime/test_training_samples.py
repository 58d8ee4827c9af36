"""Test the answers that SFT, DPO and PPO sample while they train: training is the same without them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tasks.config.jobs import DpoJob, Job, PpoJob, ReferenceJob, RewardJob, SftJob
from tasks.dataset import row_sample
from tasks.programs import dpo, ppo, reference, reward, sft
from tasks.programs.runtime import training_samples
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import sampling
from tasks.rlhf.compute import distributed
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 24}
DROPOUT = {"rank": 2, "alpha": 4, "dropout": 0.1}
SHORT = {"lora": DROPOUT, "max_steps": 6, "epochs": 80, "batch_size": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": SHORT | {"block_tokens": 96},
    "dpo": SHORT,
    "ppo": {"lora": {"rank": 2, "alpha": 4}, "steps": 6, "rollouts": 6, "minibatch": 3},
}
INPUTS = {
    "sft": ("data", "base"),
    "dpo": ("data", "model", "reference"),
    "ppo": ("data", "model", "reward"),
}
PROGRAMS: dict[str, tuple[Callable[[Any, Run], None], type[Job]]] = {
    "sft": (sft.train, SftJob),
    "dpo": (dpo.train, DpoJob),
    "ppo": (ppo.train, PpoJob),
}
Trained = Callable[..., Run]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("samples")
    data = tiny.data_folder(root / "data", 40)
    found = {"data": data, "model": tiny.trained_folder(root / "base", data)}
    found["base"] = found["model"]
    both = {name: found[name] for name in ("data", "model")}
    job = {"seed": 0, "text": TEXT, "reward": {"lora": {"rank": 2, "alpha": 4}, "max_steps": 4}}
    scored = Run(tiny.write_job(root / "reward", "reward", job, both))
    reward.train(RewardJob.model_validate(scored.record), scored)
    known = Run(tiny.write_job(root / "reference", "reference", {"text": TEXT}, both))
    reference.compute(ReferenceJob.model_validate(known.record), known)
    return found | {"reward": scored.artifact, "reference": known.artifact}


@pytest.fixture
def trained(inputs: dict[str, Path], tmp_path: Path) -> Trained:
    """Train a stage with some settings of its own and of its samples changed."""

    def train(
        stage: str,
        name: str = "",
        *,
        samples: dict[str, Any] | None = None,
        micro_batch: int = 0,
        **changed: Any,
    ) -> Run:
        job = {"seed": 3, "text": TEXT, stage: SETTINGS[stage] | changed, "samples": samples or {}}
        given = {name: inputs[name] for name in INPUTS[stage]}
        run = Run(tiny.write_job(tmp_path / (name or stage), stage, job, given, micro_batch=micro_batch))
        program, job_type = PROGRAMS[stage]
        program(job_type.model_validate(run.record), run)
        return run

    return train


def samples_of(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Return the answers by step."""
    lines = map(json.loads, (run.artifact / "samples.jsonl").read_text().splitlines())
    return {line["step"]: line["answers"] for line in lines}


def contents(run: Run) -> dict[str, bytes]:
    files = sorted(path for path in run.artifact.rglob("*") if path.is_file())
    return {path.relative_to(run.artifact).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("stage", PROGRAMS)
def test_training_is_the_same_to_the_byte_without_samples(trained: Trained, stage: str) -> None:
    sampled = contents(trained(stage, "with", samples={"every": 1, "temperature": 1.5}))
    plain = contents(trained(stage, "without", samples={"prompts": 0}))
    assert sampled.pop("samples.jsonl")
    assert any(name.endswith(".safetensors") for name in plain)
    assert sampled == plain


def test_all_stages_answer_the_same_questions_and_begin_with_the_same_answers(
    trained: Trained, inputs: dict[str, Path]
) -> None:
    found = {stage: samples_of(trained(stage)) for stage in PROGRAMS}
    rows = pq.read_table(inputs["data"] / "evaluation.parquet").to_pylist()
    drawn = [rows[i] for i in row_sample.draw_sample([row["question_id"] for row in rows], 8)]
    for answers in (answers for samples in found.values() for answers in samples.values()):
        assert [(a["question_id"], a["question"]) for a in answers] == [
            (row["question_id"], row["prompt"]) for row in drawn
        ]
    first = {stage: [answer["answer"] for answer in samples[0]] for stage, samples in found.items()}
    assert first["sft"] == first["dpo"] == first["ppo"]  # the SFT model of this test is the base
    assert len(set(first["sft"])) > 4
    assert all(answer["kl"] == 0 for samples in found.values() for answer in samples[0])
    assert all(any(answer["kl"] for answer in samples[6]) for samples in found.values())
    assert all("reward" in answer for answer in found["ppo"][6])
    assert not any("reward" in answer for stage in ("sft", "dpo") for answer in found[stage][6])


@pytest.mark.parametrize(
    ("stage", "every", "steps"),
    [
        ("sft", None, [0, 2, 3, 4, 6]),
        ("sft", 1, [*range(7)]),
        ("sft", 4, [0, 4, 6]),
        ("ppo", None, [0, 2, 3, 4, 6]),
        ("ppo", 100, [0, 6]),
    ],
)
def test_the_first_and_the_last_weights_always_answer(
    trained: Trained, stage: str, every: int | None, steps: list[int]
) -> None:
    assert list(samples_of(trained(stage, samples={"prompts": 2, "every": every}))) == steps


def test_the_last_weights_of_a_run_that_stops_early_answer(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(sft, "held_out_loss", lambda *_, **__: next(losses))
    run = trained("sft", samples={"prompts": 2, "every": 100}, evaluations=6, patience=2)
    assert list(samples_of(run)) == [0, 3]


def test_kl_and_length_are_those_of_the_librarys_own_log_probabilities(
    trained: Trained, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[tuple[list[int], list[int]]] = []
    honest = sampling.sample

    def record(model: Any, questions: list[list[int]], **more: Any) -> sampling.Samples:
        samples = honest(model, questions, **more)
        answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
        sampled[:] = zip(questions, answers, strict=True)
        return samples

    monkeypatch.setattr(training_samples.sampling, "sample", record)
    run = trained("sft", keep="last", learning_rate=2e-2, samples={"temperature": 0.5})
    base, adapted = (AutoModelForCausalLM.from_pretrained(inputs["base"]).eval() for _ in range(2))
    expected = []
    for model in (base, PeftModel.from_pretrained(adapted, run.artifact / "adapter").eval()):
        for question, answer in sampled:
            with torch.no_grad():
                logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
            logp = torch.log_softmax(logits / 0.5, dim=-1)
            expected.append(logp[range(len(answer)), answer].sum().item())
    last = samples_of(run)[6]
    kl = [after - before for before, after in zip(expected[:8], expected[8:], strict=True)]
    assert [answer["kl"] for answer in last] == pytest.approx(kl, abs=1e-3)
    assert max(map(abs, kl)) > 0.1
    assert [answer["length"] for answer in last] == [len(answer) for _, answer in sampled]
    assert [answer["ended"] for answer in last] == [answer[-1] == tiny.EOS for _, answer in sampled]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_policies_answer_without_dropout(trained: Trained, stage: str) -> None:
    often, once = (  # an evaluation of the held-out loss switches dropout off as well
        samples_of(trained(stage, str(evaluations), samples={"every": 1}, evaluations=evaluations))
        for evaluations in (6, 1)
    )
    assert often == once


def test_an_answer_without_an_end_has_the_reward_that_ppo_gives_it(trained: Trained) -> None:
    run = trained("ppo", missing_eos_reward=-7.5, samples={"temperature": 5.0})
    answers = [answer for step in samples_of(run).values() for answer in step]
    assert {answer["ended"] for answer in answers} == {True, False}
    for answer in answers:
        assert (answer["reward"] == -7.5) == (not answer["ended"])


def test_parts_of_a_batch_answer_as_all_of_it(trained: Trained) -> None:
    whole, parts = trained("sft", "whole"), trained("sft", "parts", micro_batch=3)
    for one, two in zip(samples_of(whole)[0], samples_of(parts)[0], strict=True):
        assert one == pytest.approx(two)


@pytest.mark.parametrize(
    ("changed", "has_kl"),
    [
        ({"tune": "full", "learning_rate": 1e-4}, False),
        ({"tune": "bottleneck", "bottleneck": {"width": 8}}, True),
        ({"tune": "bottleneck", "bottleneck": {"width": 8, "whole_layers": True}}, False),
    ],
    ids=["full", "bottleneck", "whole layers"],
)
def test_there_is_a_kl_if_the_reference_is_still_in_memory(
    trained: Trained, changed: dict[str, Any], has_kl: bool
) -> None:
    samples = samples_of(trained("dpo", **changed))
    assert {"kl" in answer for answers in samples.values() for answer in answers} == {has_kl}
    if has_kl:
        assert [answer["kl"] for answer in samples[0]] == [0.0] * 8
        assert any(answer["kl"] for answer in samples[6])


def test_sharded_weights_do_not_answer_and_that_is_said(
    trained: Trained, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"seed": 3, "text": TEXT, "sft": SETTINGS["sft"] | {"tune": "full"}}
    given = {name: inputs[name] for name in INPUTS["sft"]}
    run = Run(tiny.write_job(tmp_path / "shard", "sft", job, given, launch={"sft": {"shard": True}}))
    monkeypatch.setattr(distributed, "world", lambda: 2)
    sampler = training_samples.build_sampler(
        SftJob.model_validate(run.record),
        run,
        tiny.tokenizer(),
        None,
        total=6,  # type: ignore[arg-type]
    )
    assert sampler is None
    assert run.warnings == [
        "No answers were sampled during training: the weights are sharded over the processes."
    ]


def test_data_without_an_evaluation_split_has_no_samples(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = tiny.data_folder(tmp_path / "data", num_evaluation=0)
    job = {"seed": 3, "text": TEXT, "sft": SETTINGS["sft"]}
    run = Run(tiny.write_job(tmp_path / "sft", "sft", job, {"data": data, "base": inputs["base"]}))
    sft.train(SftJob.model_validate(run.record), run)
    assert not (run.artifact / "samples.jsonl").exists()
