"""Test what PPO's answers are scored with: other reward models, functions of the user's, and their mix."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from tasks.artifacts.reward_sources import function_digests
from tasks.config.jobs import PpoJob, RewardJob
from tasks.config.sections.rewards import Rewards
from tasks.programs import ppo, reward
from tasks.programs.ppo_stage.other_reward_models import AnsweredQuestions, SharedScorer, TextScorer
from tasks.programs.ppo_stage.reward_mix import RewardMix, load_reward_mix
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.models import loading, sequence_classifier
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs
from tests.programs.ppo.ppo_jobs import LORA, TEXT
from tests.support import tiny

EVERY_STEP = {"checkpoint_steps": 10}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("mix"))


@pytest.fixture(scope="module")
def second(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another reward model on the same base."""
    return train_reward(tmp_path_factory.mktemp("second") / "reward", inputs, seed=5)


def train_reward(folder: Path, inputs: dict[str, Path], *, seed: int, **settings: Any) -> Path:
    job = {"seed": seed, "text": TEXT, "reward": {"lora": LORA, "max_steps": 6} | settings}
    run = Run(tiny.write_job(folder, "reward", job, {name: inputs[name] for name in ("data", "model")}))
    reward.train(RewardJob.model_validate(run.record), run)
    return run.artifact


@pytest.fixture(scope="module")
def other_base(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return another base, of another architecture, with a reward model on it."""
    root = tmp_path_factory.mktemp("other")
    base = tiny.base_folder(root / "base", "qwen2")
    return {"base": base, "reward": train_reward(root / "reward", inputs | {"model": base}, seed=1)}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield a function that writes a module of the user's and makes it importable until the test ends."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = {*sys.modules}

    def write(text: str, name: str = "my_rewards") -> Path:
        sys.modules.pop(name, None)
        (folder / f"{name}.py").write_text(text)
        return folder

    yield write
    for name in {*sys.modules} - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def start(
    folder: Path,
    inputs: dict[str, Path],
    rewards: dict[str, Any],
    more: dict[str, Path] | None = None,
    **changed: Any,
) -> tuple[PpoJob, Run]:
    for model in rewards.get("models", []):
        model.setdefault("path", "known as an input")
    return ppo_jobs.write_run(folder, inputs | (more or {}), rewards=rewards, **changed)


def load_mix(job: PpoJob, run: Run, state: dict[str, Any] | None = None) -> RewardMix:
    encoder = pair_tables.build_encoder(job.text, loading.load_tokenizer(run.inputs["model"]), {})
    models = ppo.load_models(job, run, tiny.CPU)
    return load_reward_mix(job, run, encoder, models, state or {}, tiny.CPU)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


WORDS = "def words(questions, answers):\n    return [len(a.split()) for a in answers]\n"
ONE_FUNCTION = [{"name": "words", "function": "my_rewards:words", "weight": 0.5}]


# ------------------------------------------------------------------------------------------ models


def test_a_second_model_on_the_same_base_is_mixed_by_its_weight(
    inputs: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    rewards: dict[str, Any] = {"models": [{"name": "harmless", "weight": 0.5}], "model_weight": 2.0}
    job, run = start(
        tmp_path / "run",
        inputs,
        rewards,
        {"reward_harmless": second},
        missing_eos="add",
        missing_eos_reward=0.0,
    )
    ppo.train(job, run)
    for line in lines(run):
        assert line["reward"] == pytest.approx(
            2 * line["reward_model"] + 0.5 * line["reward_harmless"], abs=1e-5
        )
        assert line["reward_model"] != pytest.approx(line["reward_harmless"], abs=1e-3)
    assert (run.artifact / "samples.jsonl").exists()


def test_the_same_model_twice_is_that_model_with_both_weights(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Normalised by what is stored with it, read from the policy's own tokens."""
    job, run = start(
        tmp_path / "run", inputs, {"models": [{"name": "again"}]}, {"reward_again": inputs["reward"]}
    )
    ppo.train(job, run)
    for line in lines(run):
        assert line["reward_again"] == pytest.approx(line["reward_model"], abs=1e-5)


def test_a_model_of_another_base_reads_text_with_its_own_tokenizer(
    inputs: dict[str, Path], other_base: dict[str, Path], tmp_path: Path
) -> None:
    rewards: dict[str, Any] = {"models": [{"name": "other", "base": "named"}]}
    more = {"reward_other": other_base["reward"], "base_other": other_base["base"]}
    job, run = start(tmp_path / "run", inputs, rewards, more)
    mix = load_mix(job, run)
    scorer = mix.parts[0].score
    assert isinstance(scorer, TextScorer)
    probes = json.loads((other_base["reward"] / "reward.json").read_text())
    words = loading.load_tokenizer(other_base["base"])
    asked = [words.decode(probe["prompt"]) for probe in probes["probes"]]
    questions = [text.removeprefix("Question: ").partition("\n\n")[0] for text in asked]
    answers = [words.decode(probe["answer"], skip_special_tokens=True).strip() for probe in probes["probes"]]
    found = scorer(AnsweredQuestions(questions, answers, [True] * len(answers), {}))
    stored = [(probe["score"] - probes["mean"]) / probes["std"] for probe in probes["probes"]]
    assert found.tolist() == pytest.approx(stored, abs=1e-3)
    ppo.train(job, run)
    assert lines(run)[0]["reward_other"] != lines(run)[0]["reward_model"]


def test_an_adapter_of_another_base_asks_for_that_base(
    inputs: dict[str, Path], other_base: dict[str, Path], tmp_path: Path
) -> None:
    job, run = start(
        tmp_path / "run", inputs, {"models": [{"name": "other"}]}, {"reward_other": other_base["reward"]}
    )
    with pytest.raises(
        InputError, match=r"^ppo\.rewards\.models other was trained on another base.* in base\."
    ):
        ppo.train(job, run)


def test_a_model_with_weights_of_its_own_needs_no_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole = train_reward(tmp_path / "whole", inputs, seed=2, tune="full", learning_rate=1e-3)
    job, run = start(tmp_path / "run", inputs, {"models": [{"name": "whole"}]}, {"reward_whole": whole})
    ppo.train(job, run)
    assert all("reward_whole" in line for line in lines(run))


def classifier(folder: Path, *, labels: int = 1, kind: str = "llama") -> Path:
    """Write a random sequence classification model with the tests' tokenizer."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 256,
        "num_labels": labels,
        "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": tiny.EOS,
    }  # fmt: skip
    model = (
        LlamaForSequenceClassification(LlamaConfig(**sizes))
        if kind == "llama"
        else Qwen2ForSequenceClassification(Qwen2Config(**sizes))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_classifier_in_hugging_face_format_scores_as_transformers_does(
    inputs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = classifier(tmp_path / "classifier", kind=kind)
    job, run = start(tmp_path / "run", inputs, {"models": [{"name": "hub"}]}, {"reward_hub": folder})
    mix = load_mix(job, run)
    scorer = mix.parts[0].score
    assert isinstance(scorer, TextScorer)
    mean, std = mix.measured["hub"]
    questions, answers = ["How do I list files?", "What?"], ["Use list files.", "show ports"]
    found = scorer(AnsweredQuestions(questions, answers, [True, False], {}))
    words = tiny.tokenizer()
    kinds = {"llama": LlamaForSequenceClassification, "qwen2": Qwen2ForSequenceClassification}
    model = kinds[kind].from_pretrained(folder)
    for row, end in enumerate([[tiny.EOS], []]):
        text = f"Question: {questions[row]}\n\nAnswer: {answers[row]}"
        ids = torch.tensor([[*words(text)["input_ids"], *end]])
        with torch.no_grad():
            expected = (model(ids).logits[0, 0].item() - mean) / std
        assert found[row].item() == pytest.approx(expected, abs=1e-4)
    ppo.train(job, run)


def test_a_classifier_is_normalised_over_reference_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = classifier(tmp_path / "classifier")
    job, run = start(tmp_path / "run", inputs, {"models": [{"name": "hub"}]}, {"reward_hub": folder})
    mix = load_mix(job, run)
    score = mix.parts[0].score
    import pyarrow.parquet as pq

    rows = pq.read_table(inputs["data"] / "finetune.parquet").to_pylist()
    texts = AnsweredQuestions(
        [r["prompt"] for r in rows], [r["answer"] for r in rows], [True] * len(rows), {}
    )
    assert isinstance(score, TextScorer)
    rewards = score(texts)
    assert rewards.mean().item() == pytest.approx(0, abs=1e-4)
    assert rewards.std().item() == pytest.approx(1, abs=1e-4)


def test_a_classifier_with_several_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^the model: .* is no decoder with one label"):
        sequence_classifier.load(
            classifier(tmp_path / "three", labels=3), device=tiny.CPU, setting="the model"
        )


def test_a_language_model_is_no_reward_model(inputs: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"lacks 1 tensors of a reward model, first score\.weight"):
        sequence_classifier.load(inputs["model"], device=tiny.CPU, setting="the model")


def test_a_model_that_changes_between_start_and_resume_is_noticed(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder = classifier(tmp_path / "classifier")
    job, run = start(tmp_path / "run", inputs, {"models": [{"name": "hub"}]}, {"reward_hub": folder})
    state = json.loads(json.dumps(load_mix(job, run).state()))
    load_mix(job, run, state)
    classifier(tmp_path / "changed", kind="qwen2")
    job, moved = start(
        tmp_path / "moved", inputs, {"models": [{"name": "hub"}]}, {"reward_hub": tmp_path / "changed"}
    )
    with pytest.raises(StepZeroError, match="The rewards of hub for reference answers now and when"):
        load_mix(job, moved, state)


def test_a_changed_adapter_is_noticed(inputs: dict[str, Path], second: Path, tmp_path: Path) -> None:
    import shutil

    changed = tmp_path / "changed"
    shutil.copytree(second, changed)
    record = json.loads((changed / "reward.json").read_text())
    record["probes"][0]["score"] += 1
    (changed / "reward.json").write_text(json.dumps(record))
    job, run = start(tmp_path / "run", inputs, {"models": [{"name": "b"}]}, {"reward_b": changed})
    with pytest.raises(StepZeroError, match=r"ppo\.rewards\.models b the reward model's probe scores"):
        ppo.train(job, run)


# --------------------------------------------------------------------------------------- functions


def test_a_function_scores_the_texts_of_questions_and_answers(
    inputs: dict[str, Path], tmp_path: Path, module: Any
) -> None:
    module(
        "seen = []\n\ndef words(questions, answers):\n    seen.append((questions, answers))\n"
        "    return [len(a.split()) for a in answers]\n"
    )
    job, run = start(
        tmp_path / "run", inputs, {"functions": ONE_FUNCTION}, missing_eos="add", missing_eos_reward=0.0
    )
    ppo.train(job, run)
    for line in lines(run):
        assert line["reward"] == pytest.approx(line["reward_model"] + 0.5 * line["reward_words"], abs=1e-5)
    questions, answers = sys.modules["my_rewards"].seen[-1]
    known = pq.read_table(inputs["data"] / "rl.parquet")["prompt"].to_pylist()
    assert all(question.startswith("How do I ") for question in questions)
    rollouts = [texts for texts in sys.modules["my_rewards"].seen if set(texts[0]) <= set(known)]
    assert rollouts
    assert not any(question in answer for question, answer in zip(questions, answers, strict=True))


def test_a_function_can_replace_the_reward_model(
    inputs: dict[str, Path], tmp_path: Path, module: Any
) -> None:
    module(WORDS)
    rewards = {"functions": [{"name": "words", "function": "my_rewards:words"}], "model_weight": 0.0}
    job, run = start(tmp_path / "run", inputs, rewards, missing_eos="add", missing_eos_reward=0.0)
    models = ppo.load_models(job, run, tiny.CPU)
    assert models.value_head is not None
    assert models.value_head.weight.abs().max() == 0, "the critic starts at what the policy is paid: nothing"
    ppo.train(job, run)
    for line in lines(run):
        assert line["reward"] == pytest.approx(line["reward_words"], abs=1e-5)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (
            "def words(q, a):\n    return [1.0]\n",
            r"returned 1 numbers for 8 answers: it must return one for each",
        ),
        (
            "def words(q, a):\n    return [float('nan')] * len(a)\n",
            r"returned nan for answer 1 of 8, '.*return a fin",
        ),
        (
            "def words(q, a):\n    return [None] * len(a)\n",
            r"returned NoneType instead of a number for answer 1 of 8",
        ),
        ("def words(q, a):\n    return 3\n", r"raised TypeError: 'int' object is not iterable"),
        (
            "def words(q, a):\n    return [1 / 0 for _ in a]\n",
            r"raised ZeroDivisionError: division by zero \(line 2 of my_rewards\.py\)$",
        ),
        ("words = 3\n", r"is no function but int$"),
        (
            "import nowhere_at_all\nwords = 3\n",
            r"importing my_rewards raised ModuleNotFoundError: No module named",
        ),
        ("def word(q, a):\n    return [0] * len(a)\n", r"the module my_rewards has no function words$"),
    ],
)
def test_a_wrong_function_ends_the_run_with_one_sentence(
    inputs: dict[str, Path], tmp_path: Path, module: Any, code: str, sentence: str
) -> None:
    module(code)
    job, run = start(tmp_path / "run", inputs, {"functions": ONE_FUNCTION})
    with pytest.raises(
        InputError, match=r"^ppo\.rewards\.functions words \(my_rewards:words\).*" + sentence
    ) as found:
        ppo.train(job, run)
    assert "\n" not in str(found.value)
    assert not list(run.artifact.iterdir())


def test_a_module_that_is_not_on_this_machine_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    job, run = start(tmp_path / "run", inputs, {"functions": [{"name": "f", "function": "no.such:f"}]})
    with pytest.raises(InputError, match=r"cannot be imported here: install the module no\.such, or put"):
        ppo.train(job, run)


def test_another_source_than_the_one_in_the_key_is_refused(
    inputs: dict[str, Path], tmp_path: Path, module: Any
) -> None:
    """As on a worker that has an older file."""
    module(WORDS)
    job, run = start(tmp_path / "run", inputs, {"functions": ONE_FUNCTION})
    asked = job.model_copy(update={"reward_code": function_digests(job.ppo.rewards)})
    ppo.train(asked, run)
    module(WORDS + "# changed\n")
    with pytest.raises(InputError, match="has another source here than where the run was started"):
        ppo.train(asked, start(tmp_path / "other", inputs, {"functions": ONE_FUNCTION})[1])


def test_a_function_that_draws_at_random_is_warned_of(
    inputs: dict[str, Path], tmp_path: Path, module: Any
) -> None:
    module("import random\n\ndef words(q, a):\n    return [random.SystemRandom().random() for _ in a]\n")
    job, run = start(tmp_path / "run", inputs, {"functions": ONE_FUNCTION})
    ppo.train(job, run)
    assert any("cannot be repeated, nor resumed exactly" in sentence for sentence in run.warnings)


# ------------------------------------------------------------------------------ the sum, and resuming


def test_the_default_mix_changes_no_score(inputs: dict[str, Path], tmp_path: Path) -> None:
    job, run = start(tmp_path / "run", inputs, {})
    ppo.train(job, run)
    assert not any(name.startswith("reward_") for line in lines(run) for name in line)
    job, same = start(tmp_path / "same", inputs, {"model_weight": 1.0, "running_normalisation": False})
    ppo.train(job, same)
    ppo_jobs.assert_same_weights(run, same)


def test_running_normalisation_shifts_and_scales_by_all_answers_so_far(
    inputs: dict[str, Path], tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(WORDS)
    rewards = {"functions": ONE_FUNCTION, "running_normalisation": True}
    seen: list[tuple[Any, Any]] = []
    rescore = RewardMix.rescore

    def watched(self: RewardMix, *asked: Any) -> Any:
        found = rescore(self, *asked)
        seen.append((found.score, self.moments))
        return found

    monkeypatch.setattr(RewardMix, "rescore", watched)
    job, run = start(tmp_path / "run", inputs, rewards, steps=3, missing_eos="add", missing_eos_reward=0.0)
    ppo.train(job, run)
    assert [moments.num_values for _, moments in seen] == [8, 16, 24]
    first = seen[0][0]
    assert first.mean().item() == pytest.approx(0, abs=1e-5)
    assert first.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert seen[1][0].mean().abs().item() > 1e-3, "the second batch is held against both"


def test_a_cut_run_with_a_mix_ends_with_the_same_bytes(
    inputs: dict[str, Path], second: Path, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(WORDS)
    rewards: dict[str, Any] = {
        "models": [{"name": "harmless"}, {"name": "hub"}], "functions": ONE_FUNCTION,
        "running_normalisation": True,
    }  # fmt: skip
    more = {"reward_harmless": second, "reward_hub": classifier(tmp_path / "classifier")}
    settings: dict[str, Any] = {"steps": 3, "machine": EVERY_STEP}
    job, whole = start(tmp_path / "whole", inputs, rewards, more, **settings)
    ppo.train(job, whole)
    job, cut = start(tmp_path / "cut", inputs, rewards, more, **settings)
    ppo_jobs.train_with_a_cut(job, cut, monkeypatch)
    ppo_jobs.assert_same_weights(whole, cut)
    assert (whole.artifact / "metrics.jsonl").read_bytes() == (cut.artifact / "metrics.jsonl").read_bytes()
    assert (whole.artifact / "samples.jsonl").read_bytes() == (cut.artifact / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model_weight": 0}, "there is no other reward"),
        ({"functions": [ONE_FUNCTION[0], ONE_FUNCTION[0]]}, "two rewards are called words: give each"),
        (
            {"functions": [{"name": "model", "function": "a:b"}]},
            "two rewards are called model .the name of the run",
        ),
        ({"functions": [{"name": "a", "function": "a:b", "weight": 0}]}, "the weight of a is 0"),
        ({"functions": [{"name": "a", "function": "a.b"}]}, "should match pattern"),
        ({"models": [{"name": "A b", "path": "x"}]}, "should match pattern"),
        ({"models": [{"name": "a"}]}, "Field required"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Rewards.model_validate(settings)


def test_a_shared_model_reads_the_policys_tokens(
    inputs: dict[str, Path], second: Path, tmp_path: Path
) -> None:
    job, run = start(
        tmp_path / "run", inputs, {"models": [{"name": "harmless"}]}, {"reward_harmless": second}
    )
    assert isinstance(load_mix(job, run).parts[0].score, SharedScorer)
