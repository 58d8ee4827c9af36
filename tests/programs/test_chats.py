"""Test that programs encode conversations with their roles, and count the loss on every answer or one."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tasks.config.commands.usage import ExportDataJob
from tasks.config.jobs import PpoJob, PretrainJob, RewardJob, SftJob
from tasks.config.sections.models import Text
from tasks.config.sections.reward import Reward
from tasks.config.sections.sft import LossOn
from tasks.dataset import conversation
from tasks.dataset.conversation import from_records
from tasks.dataset.row_sample import draw_sample
from tasks.dataset.tables import MESSAGES
from tasks.judges.judge import Answer
from tasks.judges.reward_judge import RewardScores
from tasks.programs import ppo, pretrain, sft
from tasks.programs.ppo_stage.other_reward_models import AnsweredQuestions, TextScorer
from tasks.programs.runtime import pair_tables, reward_tests, table_rows
from tasks.programs.runtime.program import Run
from tasks.programs.runtime.training_samples import TrainingSampler
from tasks.programs.token_tables.documents import read_finetune_split
from tasks.programs.token_tables.prompts import find_chats
from tasks.programs.token_tables.questions import read_pairs
from tasks.programs.usage.export_data import export_data
from tasks.rlhf.batches import conversations
from tasks.rlhf.batches.prompts import encode_answer
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.models import builtin, reward_model
from tests.support import tiny
from tests.support.chat_families import CHATML
from tests.support.data_sets import chat_message, run_data_program

LIMITS = {"max_prompt_tokens": 100, "max_answer_tokens": 20}
TEXT = Text(template="chat", **LIMITS)  # type: ignore[arg-type]


def tokenizer() -> PreTrainedTokenizerBase:
    made = tiny.tokenizer()
    made.chat_template = CHATML.replace("<|im_end|>", "<eos>").replace("<|im_start|>", "<pad>")
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tables of comparisons, half of them of conversations."""
    root = tmp_path_factory.mktemp("chats")
    talk = [chat_message("user", "list files"), chat_message("assistant", "show <eos> disks")]
    rows = []
    for n in range(80):
        asked = chat_message("user", f"sort {n}")
        rows.append({"prompt": [*talk, asked] if n % 2 else [asked], "chosen": f"use {n}", "rejected": "no"})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shares = {"finetune_share": 0.4, "reward_share": 0.2, "rl_share": 0.2}
    return run_data_program(root / "rows.jsonl", root / "run", {"kind": "own"}, **shares)[0]


def run_on(folder: Path, stage: str, job: dict[str, Any], **inputs: Path) -> Run:
    return Run(tiny.write_job(folder, stage, job, inputs))


def counted_texts(data: Path, folder: Path, loss_on: LossOn) -> set[str]:
    made = tokenizer()
    encoder = pair_tables.build_encoder(TEXT, made, {})
    documents = read_finetune_split(run_on(folder, "sft", {}, data=data), encoder, loss_on=loss_on)
    texts = [
        made.decode([id for id, is_target in zip(*document, strict=True) if is_target])
        for document in documents
    ]
    assert len(texts) > 20
    return {"".join(letter for letter in text if not letter.isdigit()) for text in texts}


def test_row_groups_without_messages_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [[], [], [{"role": "user", "content": "Hi"}], None]
    table = pa.table({"prompt": ["a", "b", "c", "d"], "messages": pa.array(records, MESSAGES)})
    pq.write_table(table, tmp_path / "finetune.parquet", row_group_size=2)
    pq.write_table(table.slice(0, 2), tmp_path / "rl.parquet")
    pq.write_table(table.drop_columns("messages"), tmp_path / "other.parquet")
    read, whole = [], pq.ParquetFile.iter_batches

    def iter_batches(file: pq.ParquetFile, **options: Any) -> Any:
        read.append(options["row_groups"])
        return whole(file, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert table_rows.read_chats(*sorted(tmp_path.iterdir()), tmp_path / "none.parquet") == {
        "c": (("user", "Hi"),)
    }
    assert read == [[1], [], []]


def test_some_rows_are_read_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_rows, "BATCH_ROWS", 3)
    table = pa.table({"prompt": [*map(str, range(20))], "answer": [*range(20)], "other": [0] * 20})
    pq.write_table(table, tmp_path / "rl.parquet", row_group_size=7)
    places = [19, 2, 6, 7, 2, 11]
    found = table_rows.read_rows(tmp_path / "rl.parquet", places, ["answer", "prompt", "messages"])
    assert found == [{"prompt": str(place), "answer": place} for place in places]
    assert table_rows.read_rows(tmp_path / "rl.parquet", [], ["prompt"]) == []


def check_drawn(encoder: Encoder, prompts: list[list[int]], table: Path, count: int) -> None:
    """Check the prompts of drawn rows, and that the encoder knows the conversations of these alone."""
    rows = pq.read_table(table).to_pylist()
    drawn = [rows[place] for place in draw_sample([row["question_id"] for row in rows], count)]
    chats = {row["prompt"]: from_records(row["messages"]) for row in drawn if row["messages"]}
    assert encoder.chats == chats
    assert 0 < len(chats) < count
    own = pair_tables.build_encoder(TEXT, encoder.tokenizer, chats)
    assert sorted(prompts) == sorted(own.encode_prompt(row["prompt"]) for row in drawn)


def test_conversations_that_are_not_drawn_are_not_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on(tmp_path / "run", "sft", {}, data=data)
    monkeypatch.setattr(reward_tests, "REFERENCE_ANSWERS", 6)
    encoder = pair_tables.build_encoder(TEXT, tokenizer(), {})
    job = RewardJob(seed=0, text=TEXT, reward=Reward(red_team_answers=5))
    found, _ = reward_tests.read_answers(job, run, encoder)
    check_drawn(encoder, [prompt for prompt, _ in found], data / "finetune.parquet", 6)


@pytest.mark.parametrize("count", [0, 7])
def test_a_sampler_keeps_the_conversations_that_it_answers(data: Path, tmp_path: Path, count: int) -> None:
    run = run_on(tmp_path / "run", "sft", {}, data=data)
    job = SftJob.model_validate(
        {"seed": 0, "text": TEXT.model_dump(), "sft": {}, "samples": {"prompts": count}}
    )
    sampler = TrainingSampler(job, run, tokenizer(), policy=nullcontext, reference=None, total=4)  # type: ignore[arg-type]
    if count:
        check_drawn(sampler.encoder, sampler.prompts, data / "evaluation.parquet", count)
    else:
        assert (sampler.questions, sampler.encoder.chats) == ([], {})


def test_ppo_keeps_the_conversations_of_its_score(data: Path, tmp_path: Path) -> None:
    run = run_on(tmp_path / "run", "ppo", {}, data=data)
    settings = {"score": {"by": "gold", "prompts": 8}, "steps": 1}
    job = PpoJob.model_validate({"seed": 0, "text": TEXT.model_dump(), "ppo": settings})
    encoder = pair_tables.build_encoder(TEXT, tokenizer(), {})
    learnt, held_out = ppo.read_questions(job, run, encoder)
    check_drawn(encoder, [encoder.encode_prompt(text) for _, text in held_out], data / "rl.parquet", 8)
    chats = table_rows.read_chats(data / "rl.parquet")
    whole = pair_tables.build_encoder(TEXT, encoder.tokenizer, chats)
    assert [prompt.ids for prompt in learnt] == [whole.encode_prompt(prompt.question) for prompt in learnt]
    assert find_chats(learnt) | encoder.chats == chats


def test_the_loss_counts_every_answer_or_the_last(data: Path, tmp_path: Path) -> None:
    last, earlier = "use <eos>", "show <eos> disks<eos>"
    assert counted_texts(data, tmp_path / "last", "last") == {last}
    assert counted_texts(data, tmp_path / "every", "every") == {last, earlier + last}
    assert any("list files" in text for text in counted_texts(data, tmp_path / "all", "all"))


def test_pairs_prompts_and_judges_read_the_roles(data: Path, tmp_path: Path) -> None:
    made = tokenizer()
    chats = table_rows.read_chats(data / "evaluation.parquet")
    encoder = pair_tables.build_encoder(TEXT, made, chats)
    seen = []
    for table in ("reward", "evaluation_pairs"):
        run = run_on(tmp_path / table, "reward", {}, data=data)
        comparisons = read_pairs(run, data / f"{table}.parquet", encoder)
        rows = {row["question_id"]: row for row in pq.read_table(data / f"{table}.parquet").to_pylist()}
        for one in comparisons:
            row = rows[one.question_id]
            messages = from_records(row["messages"]) or (("user", row["prompt"]),)
            assert one.prompt == conversations.encode_messages(made, messages, "chat")
            seen.append(len(messages))
    assert set(seen) == {1, 3}
    asked: list[Any] = []

    class Recorder(RewardScores):
        def __call__(self, pairs: Any, report_progress: Any) -> list[float]:
            asked.extend(self.encoder.encode_prompt(question) for question, _ in pairs)
            return []

    Recorder(None, encoder, 0, tiny.CPU, 1)([(text, Answer("x")) for text in chats], lambda *_: None)  # type: ignore[arg-type]
    assert asked == [conversations.encode_messages(made, messages, "chat") for messages in chats.values()]


def test_other_reward_models_read_the_roles(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    made, chats = tokenizer(), table_rows.read_chats(data / "rl.parquet")

    def normalised_rewards(_: Any, batch: Sequences) -> Tensor:
        rows = zip(batch.input_ids.tolist(), batch.response_mask.tolist(), strict=True)
        asked.extend(ids[: response.index(True)] for ids, response in rows)
        return torch.zeros(len(batch.input_ids))

    monkeypatch.setattr(reward_model, "normalised_rewards", normalised_rewards)
    scorer: Any = TextScorer(None, pair_tables.build_encoder(TEXT, made, {}), tiny.CPU, 64)  # type: ignore[arg-type]
    scorer(AnsweredQuestions([*chats], ["x"] * len(chats), [True] * len(chats), chats))
    assert asked == [conversations.encode_messages(made, messages, "chat") for messages in chats.values()]


def test_sft_learns_conversations(data: Path, tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    tokenizer().save_pretrained(base)
    settings = {"lora": {"rank": 4, "alpha": 8.0}, "max_steps": 2, "batch_size": 2, "block_tokens": 128}
    job = {"seed": 0, "text": TEXT.model_dump(), "sft": settings}
    run = run_on(tmp_path / "run", "sft", job, data=data, base=base)
    sft.train(SftJob.model_validate(run.record), run)
    found = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    assert found["sft.messages_dropped"] == 0
    assert found["sft.held_out_loss"] > 0


def test_the_built_in_base_reads_turns(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[str] = []
    train = builtin.train_tokenizer

    def record(texts: list[str], *, vocabulary: int) -> PreTrainedTokenizerBase:
        learnt.extend(texts)
        return train(texts, vocabulary=vocabulary)

    monkeypatch.setattr(builtin, "train_tokenizer", record)
    small = {"vocabulary": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 1, "context": 64}
    job = {"seed": 0, "base": small | {"steps": 1, "batch_size": 2}}
    run = run_on(tmp_path / "run", "pretrain", job, data=data)
    pretrain.train(PretrainJob.model_validate(run.record), run)
    assert " show <eos> disks" in learnt
    assert not any("Human:" in text for text in learnt)
    assert (run.artifact / "model").is_dir()


def test_programs_and_mathematics_name_roles_alike() -> None:
    """They have a vocabulary each, because the mathematics import nothing of the data."""
    ours, theirs = ((one.USER, one.ASSISTANT, one.SYSTEM) for one in (conversation, conversations))
    assert ours == theirs


def test_a_conversation_is_exported_as_messages(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ExportDataJob(text=Text(template="question-answer"), form="parquet", about="a run")
    run = run_on(tmp_path / "run", "export_data", job.model_dump(mode="json"), data=data)
    monkeypatch.setattr(table_rows, "chats_of", lambda _: pytest.fail("all conversations were read"))
    export_data(job, run)
    rows = pq.read_table(run.artifact / "preference" / "train.parquet").to_pylist()
    assert {len(row["prompt"]) for row in rows} == {1, 3}
    assert {message["role"] for row in rows for message in row["prompt"]} == {"user", "assistant"}
    assert "exported policy's chat template" in (run.artifact / "README.md").read_text()


def test_an_answers_last_token_ends_its_turn() -> None:
    made = tokenizer()
    ids = encode_answer(made, "use it", template="chat", max_tokens=99)
    assert ids[-1] == tiny.EOS
