"""Test the program answers: what draws depend on, and the champion of an earlier run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tasks.config.jobs import AnswersJob, DpoJob, ReferenceJob
from tasks.config.sections.models import Text
from tasks.programs import answers, dpo, reference
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.sampling import uniform_numbers
from tasks.system.errors import InputError
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 12}
CHAMPION = {"text": {"max_prompt_tokens": 40, "max_answer_tokens": 3}, "precision": None}
COMMON = {"seed": 0, "text": TEXT, "winrate": {"num_questions": 9, "batch_size": 4}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a base, an SFT model and a DPO policy of it, and their data."""
    root = tmp_path_factory.mktemp("models")
    found = {"data": tiny.data_folder(root / "data", 24), "base": tiny.base_folder(root / "base")}
    found["model"] = tiny.base_folder(root / "tuned")
    tiny.model(seed=1).save_pretrained(found["model"])
    logged = Run(tiny.write_job(root / "reference", "reference", {"text": TEXT}, found))
    reference.compute(ReferenceJob.model_validate(logged.record), logged)
    settings = {"lora": {"rank": 2, "alpha": 8.0}, "max_steps": 4, "epochs": 10, "learning_rate": 2e-2}
    job = {"seed": 0, "text": TEXT, "dpo": settings | {"beta": 0.1}}
    trained = Run(tiny.write_job(root / "dpo", "dpo", job, found | {"reference": logged.artifact}))
    dpo.train(DpoJob.model_validate(trained.record), trained)
    return found | {"dpo": trained.artifact}


def answer(folder: Path, inputs: dict[str, Path], **job: Any) -> dict[str, list[Any]]:
    """Return the columns of the table that the program writes."""
    run = Run(tiny.write_job(folder, "answers", COMMON | job, inputs))
    answers.answer(AnswersJob.model_validate(run.record), run)
    columns: dict[str, list[Any]] = pq.read_table(run.artifact / "answers.parquet").to_pydict()
    return columns


@pytest.fixture(scope="module")
def alone(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return answer(tmp_path_factory.mktemp("alone") / "run", inputs)


def test_the_champion_answers_the_same_questions_and_changes_no_other_answer(
    inputs: dict[str, Path], alone: dict[str, list[Any]], tmp_path: Path
) -> None:
    champion = {"champion": inputs["dpo"], "champion_model": inputs["model"]}
    columns = answer(tmp_path / "run", inputs | champion, champion=CHAMPION)
    assert {name: columns[name] for name in alone} == alone
    new = columns["champion.answer"]
    assert len(new) == 9
    assert new != alone["dpo.answer"], "the same weights draw other numbers under another name"
    assert max(map(len, columns["champion.tokens"])) > CHAMPION["text"]["max_answer_tokens"]  # type: ignore[index]
    assert max(map(len, columns["champion.tokens"])) <= TEXT["max_answer_tokens"]
    summary = json.loads((tmp_path / "run" / "artifact" / "summary.json").read_text())
    assert summary["policies"] == ["sft", "dpo", "base", "champion"]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 4 * 3 + 1)), "three batches of each of four"


def test_the_policy_of_the_round_before_answers_too_and_changes_no_other_answer(
    inputs: dict[str, Path], alone: dict[str, list[Any]], tmp_path: Path
) -> None:
    columns = answer(tmp_path / "run", inputs | {"predecessor": inputs["dpo"]})
    assert {name: columns[name] for name in alone} == alone
    assert columns["predecessor.answer"] != alone["dpo.answer"], "it draws other numbers"
    assert None not in columns["predecessor.kl"]
    summary = json.loads((tmp_path / "run" / "artifact" / "summary.json").read_text())
    assert summary["policies"] == ["sft", "dpo", "predecessor", "base"]


def test_the_champion_is_asked_in_its_own_format(inputs: dict[str, Path], tmp_path: Path) -> None:
    champion = {"champion": inputs["dpo"], "champion_model": inputs["model"]}
    plain, other = (
        answer(
            tmp_path / template,
            inputs | champion,
            champion=CHAMPION | {"text": CHAMPION["text"] | {"template": template}},  # type: ignore[operator]
        )
        for template in ("question-answer", "human-assistant")
    )
    assert plain["dpo.answer"] == other["dpo.answer"]
    assert plain["champion.answer"] != other["champion.answer"]


def test_a_champion_on_another_model_than_its_own_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    wrong = {"champion": inputs["dpo"], "champion_model": inputs["base"]}
    with pytest.raises(InputError, match="does not belong to this base"):
        answer(tmp_path / "run", inputs | wrong, champion=CHAMPION)


def test_draws_depend_on_the_policys_name_and_the_question_alone() -> None:
    ids = [7, 3, 2**40, -5]
    ppo = uniform_numbers(0, "ppo", ids, 6)
    assert ppo.shape == (4, 6)
    assert ppo.dtype == torch.float64
    assert torch.equal(uniform_numbers(0, "ppo", ids[::-1], 6), ppo.flip(0))
    assert torch.equal(uniform_numbers(0, "ppo", ids[1:2], 6), ppo[1:2])
    others = [
        uniform_numbers(0, "dpo", ids, 6),
        uniform_numbers(1, "ppo", ids, 6),
        uniform_numbers(0, "sft", ids, 6),
    ]
    numbers = torch.cat([ppo, *others])
    assert numbers.unique().numel() == numbers.numel()


def test_the_champions_answers_end_where_it_has_ended_them() -> None:
    """In the run's own tokens: by a reward model's verdict a cut answer would gain an end."""
    tokenizer = tiny.tokenizer()
    text = Text(max_prompt_tokens=48, max_answer_tokens=12)
    found = {
        "champion.answer": pa.array(["list files", "list files", ""]),
        "champion.tokens": pa.array([[5, 6, 9], [5, 6], [9]]),  # of another model, whose end is 9
    }
    tokens = answers.own_tokens(found, (9,), pair_tables.build_encoder(text, tokenizer, {})).to_pylist()
    words = tokenizer(" list files", add_special_tokens=False)["input_ids"]
    assert tokens[:2] == [[*words, tiny.EOS], words]
    assert tokens[2][-1] == tiny.EOS
