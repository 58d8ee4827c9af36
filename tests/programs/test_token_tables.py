"""Test that a table is tokenised once and read as it was encoded, and that damaged files are made again."""

import json
import shutil
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.config.sections.sft import LossOn
from tasks.dataset.conversation import to_records
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables import cache, documents, prompts, questions
from tasks.programs.token_tables.token_table import TokenTable, to_lists
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.packing import Document
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import distributed
from tasks.system.errors import InputError
from tasks.system.locks import acquire
from tests.support import forked, tiny
from tests.support.chat_families import DATED, set_day

Limits = dict[str, Any]
LIMITS: Limits = {"template": "question-answer", "max_prompt_tokens": 24, "max_answer_tokens": 8}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    data = tiny.data_folder(tmp_path / "data", 30)
    return Run(tiny.write_job(tmp_path / "run", "sft", {}, {"data": data}))


def encoder(**limits: Any) -> Encoder:
    return Encoder(tiny.tokenizer(), **LIMITS | limits)


def rows_of(run: Run, name: str) -> list[dict[str, Any]]:
    return pq.read_table(run.inputs["data"] / f"{name}.parquet").to_pylist()


def rewrite(run: Run, name: str, rows: list[dict[str, Any]], **how: Any) -> None:
    pq.write_table(pa.Table.from_pylist(rows), run.inputs["data"] / f"{name}.parquet", **how)


def read_documents(run: Run, made: Encoder, *, loss_on: LossOn = "last") -> list[Document]:
    return list(documents.read_finetune_split(run, made, loss_on=loss_on))


def read_pairs(run: Run, made: Encoder) -> TokenTable[comparisons.Comparison]:
    return questions.read_pairs(run, run.inputs["data"] / "reward.parquet", made)


def folders(tmp_path: Path) -> set[Path]:
    return {*(tmp_path / "home" / "tokens").glob("*")}


def forbid_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[int]:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Encoder, "encode_prompt", refuse)


# ------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("loss_on", ["last", "all"])
def test_documents_are_what_the_encoder_makes_of_each_row(
    run: Run, loss_on: LossOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH_ROWS", 4)
    rewrite(run, "finetune", rows_of(run, "finetune"), row_group_size=7)
    wanted, own = [], encoder()
    for row in rows_of(run, "finetune"):
        prompt, answer = own.encode_prompt(row["prompt"]), own.encode_answer(row["answer"])
        target = [loss_on == "all"] * len(prompt) + [True] * len(answer)
        wanted.append(Document(prompt + answer, target))
    made = encoder()
    found = documents.read_finetune_split(run, made, loss_on=loss_on)
    assert list(found) == wanted
    assert documents.document_lengths(found) == [len(document.ids) for document in wanted]
    assert made.cut == own.cut
    assert made.cut.answers_cut > 0


@pytest.mark.parametrize(("batch_rows", "group_rows"), [(1, 3), (5, 100), (1000, 7)])
def test_pairs_are_what_the_whole_table_gives_whatever_the_batches(
    run: Run, batch_rows: int, group_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(run, "reward")
    for number, row in enumerate(rows):
        row["gap"], row["chosen_older"] = number / 4, (True, False, None)[number % 3]
        if row["question_id"] % 3 == 0:  # equal once cut
            row["chosen"], row["rejected"] = (
                f"{'list ' * 30} {row[side]}" for side in ("chosen", "rejected")
            )
    rewrite(run, "reward", rows, row_group_size=group_rows)
    monkeypatch.setattr(cache, "BATCH_ROWS", batch_rows)
    own, made = encoder(), encoder()
    wanted = comparisons.encode_with(own, comparisons.from_pairs(rows))
    found = read_pairs(run, made)
    assert list(found) == wanted
    assert [found[i] for i in range(len(found))] == wanted
    assert found.column("question_id") == [c.question_id for c in wanted]
    some = found.select([19, 3, 3, 11])
    for table, items in ((found, wanted), (some, list(some)), (found.select([]), [])):
        tokens = [len(c.prompt) + sum(map(len, c.answers)) for c in items]
        assert questions.text_lengths(table).tolist() == tokens
        keys = [(c.question_id, i, len(ids)) for c in items for i, ids in enumerate(c.answers)]
        columns = questions.answer_keys(table).values()
        assert [*zip(*(column.tolist() for column in columns), strict=True)] == keys
    assert made.cut == own.cut
    assert made.cut.pairs_equal == 2 * 10


def test_rankings_are_what_the_whole_table_gives(run: Run) -> None:
    rows = rows_of(run, "reward_groups")
    rows[3]["ages"] = [3.0, 1.0, 2.0]
    rows[4]["scores"] = [1.0, 1.0, 1.0]  # no pair
    rewrite(run, "reward_groups", rows)
    own, made = encoder(), encoder()
    wanted = comparisons.encode_with(own, comparisons.from_rankings(rows, most_answers=2))
    table = run.inputs["data"] / "reward_groups.parquet"
    assert list(questions.read_rankings(run, table, made, most_answers=2)) == wanted
    assert len(wanted) == len(rows) - 1
    assert made.cut == own.cut


def test_prompts_are_counted_if_they_are_used(run: Run) -> None:
    own, made, rows = encoder(max_prompt_tokens=20), encoder(max_prompt_tokens=20), [7, 3, 20]
    texts = [rows_of(run, "rl")[row]["prompt"] for row in rows]
    assert [prompt.ids for prompt in prompts.read_rl_split(run, made, rows=rows)] == [
        own.encode_prompt(text) for text in texts
    ]
    assert made.cut == own.cut
    assert made.cut.prompts == 3


def test_dropped_messages_of_prompts_are_counted_if_they_are_used(run: Run) -> None:
    rows, table = [7, 3, 20], rows_of(run, "rl")
    texts = [row["prompt"] for row in table]
    talk = [("user", "list files"), ("assistant", "copy")] * 4
    chats = {texts[row]: (*talk[: row * 2], ("user", texts[row])) for row in (0, 1, 3, 7)}
    rewrite(run, "rl", [row | {"messages": to_records(chats.get(row["prompt"], ()))} for row in table])
    own, made = encoder(chats=chats), encoder()
    for row in rows:
        own.encode_prompt(texts[row])
    prompts.read_rl_split(run, made, rows=rows)
    assert made.cut == own.cut
    assert made.cut.messages == 9 + 7
    assert made.metrics("ppo")["ppo.messages_dropped"] > 0


def test_no_table_and_no_pairs(run: Run) -> None:
    (run.inputs["data"] / "evaluation_pairs.parquet").unlink()
    assert (
        len(questions.read_evaluation(run, run.inputs["data"] / "evaluation_pairs.parquet", encoder())) == 0
    )
    schema = pq.read_schema(run.inputs["data"] / "reward.parquet")
    pq.write_table(schema.empty_table(), run.inputs["data"] / "reward.parquet")
    with pytest.raises(InputError, match=r"^The reward split has no pairs: raise data\.reward_share"):
        read_pairs(run, encoder())


# ----------------------------------------------------------------------------------- once, and checked


def test_a_second_start_tokenises_nothing_and_counts_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = encoder(), encoder()
    made = read_documents(run, first)
    forbid_encoding(monkeypatch)
    assert read_documents(run, second) == made
    assert first.cut == second.cut
    assert second.warnings()
    assert len(folders(tmp_path)) == 1


def change_table(run: Run, _: pytest.MonkeyPatch) -> Encoder:
    rows = rows_of(run, "finetune")
    rows[5]["answer"] += "."
    rewrite(run, "finetune", rows)
    return encoder()


def change_template(_: Run, __: pytest.MonkeyPatch) -> Encoder:
    return encoder(template="human-assistant")


def change_prompts(_: Run, __: pytest.MonkeyPatch) -> Encoder:
    return encoder(max_prompt_tokens=23)


def change_answers(_: Run, __: pytest.MonkeyPatch) -> Encoder:
    return encoder(max_answer_tokens=9)


def change_tokenizer(_: Run, __: pytest.MonkeyPatch) -> Encoder:
    made = encoder()
    made.tokenizer.add_tokens(["files"])
    return made


def change_chat_template(_: Run, __: pytest.MonkeyPatch) -> Encoder:
    made = encoder()
    made.tokenizer.chat_template = "{{ messages }}"
    return made


def change_code(_: Run, patch: pytest.MonkeyPatch) -> Encoder:
    patch.setattr(cache, "source_digest", lambda module: f"another {module}")
    return encoder()


def change_library(_: Run, patch: pytest.MonkeyPatch) -> Encoder:
    patch.setattr(cache, "version", lambda name: "1000")
    return encoder()


CHANGES = [
    change_table, change_template, change_prompts, change_answers, change_tokenizer, change_chat_template,
    change_code, change_library,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_ids_depend_on_is_in_the_key(
    run: Run, tmp_path: Path, change: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_documents(run, encoder())
    changed = change(run, monkeypatch)
    read_documents(run, changed)
    assert len(folders(tmp_path)) == 2
    read_documents(run, encoder(), loss_on="all")
    assert len(folders(tmp_path)) == 3


def test_a_copy_of_the_tokenizer_and_other_runs_share_the_ids(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.rlhf.models.loading import load_tokenizer

    tiny.base_folder(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    load_tokenizer(tmp_path / "base").save_pretrained(tmp_path / "merged")
    other = Run(tiny.write_job(tmp_path / "other", "sft", {}, run.inputs))
    made = read_documents(run, Encoder(load_tokenizer(tmp_path / "base"), **LIMITS))
    forbid_encoding(monkeypatch)
    assert read_documents(other, Encoder(load_tokenizer(tmp_path / "merged"), **LIMITS)) == made


def flip(folder: Path) -> None:
    part = next(folder.glob("*.arrow"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def cut(folder: Path) -> None:
    part = next(folder.glob("*.arrow"))
    part.write_bytes(part.read_bytes()[:-100])


def lose(folder: Path) -> None:
    next(folder.glob("*.arrow")).unlink()


def spoil(folder: Path) -> None:
    (folder / cache.RECORD).write_text('{"parts": []')


def miscount(folder: Path) -> None:
    record = json.loads((folder / cache.RECORD).read_text())
    (folder / cache.RECORD).write_text(json.dumps(record | {"cut": {"words": 3}}))


def forget(folder: Path) -> None:
    (folder / cache.RECORD).unlink()


@pytest.mark.parametrize("damage", [flip, cut, lose, spoil, miscount, forget])
def test_damaged_files_are_made_again(run: Run, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    first, second = encoder(), encoder()
    made = read_documents(run, first)
    (folder,) = folders(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert read_documents(run, second) == made
    assert first.cut == second.cut
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_is_deleted_meanwhile_is_not_blamed_on_the_disks_of_nodes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_documents(run, encoder())
    (folder,) = folders(tmp_path)
    (part,) = folder.glob("*.arrow")
    honest = cache._read_intact

    def read_and_lose(*places: Path) -> cache.Record | None:
        record = honest(*places)
        part.unlink()
        return record

    monkeypatch.setattr(cache, "_read_intact", read_and_lose)
    with pytest.raises(InputError, match=r"arrow was deleted while this program started: start it again"):
        read_documents(run, encoder())
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(InputError, match=r"put ALIGNFLOW_HOME on a disk that all nodes share"):
        cache._open_parts(folder, cache.Record(facts={}, parts={part.name: ""}, cut={}))


def test_an_error_in_mid_work_leaves_nothing_that_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "BATCH_ROWS", 4)
    with monkeypatch.context() as patched:
        honest = Encoder.encode_answer

        def failing(self: Encoder, answer: str) -> list[int]:
            if self.cut.answers == 10:
                raise InputError("It fails.")
            return honest(self, answer)

        patched.setattr(Encoder, "encode_answer", failing)
        with pytest.raises(InputError, match="It fails"):
            read_documents(run, encoder())
        (folder,) = folders(tmp_path)
        assert [*folder.iterdir()] == []
    assert len(read_documents(run, encoder())) == 30


def test_a_start_waits_for_another_that_tokenises_the_same(run: Run, tmp_path: Path) -> None:
    made = read_documents(run, encoder())
    (folder,) = folders(tmp_path)
    found: list[list[Document]] = []
    with acquire(tmp_path / "home" / "locks" / f"{folder.name}.lock"):
        waiting = threading.Thread(target=lambda: found.append(read_documents(run, encoder())))
        waiting.start()
        waiting.join(1)
        assert waiting.is_alive()
    waiting.join(30)
    assert found == [made]


def test_ids_lie_in_the_files_and_not_in_memory(run: Run) -> None:
    rows = [row | {"prompt": "list files", "answer": "copy " * 400} for row in rows_of(run, "finetune") * 40]
    rewrite(run, "finetune", rows)
    read_documents(run, encoder(max_answer_tokens=400))
    before = pa.total_allocated_bytes()
    found = documents.read_finetune_split(run, encoder(max_answer_tokens=400), loss_on="last")
    assert len(found) == 1200
    assert pa.total_allocated_bytes() - before < 100_000  # of 1,200 documents with 400 ids each


def test_by_hand_the_files_lie_in_the_programs_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNFLOW_HOME")
    read_documents(run, encoder())
    assert [*(run.directory / "tokens").glob(f"*/{cache.RECORD}")]


def test_ids_made_on_another_day_are_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encoder(template="chat", max_prompt_tokens=200)
    made.tokenizer.chat_template = DATED["SmolLM3"]
    found = []
    for day in (datetime(2026, 11, 29), datetime(2026, 11, 30)):
        set_day(monkeypatch, day)
        found.append(read_documents(run, made))
        (folder,) = folders(tmp_path)
        shutil.rmtree(folder)
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------ ranks

RANKS = """
import json, sys
from pathlib import Path
from tasks.programs.runtime.program import Run
from tasks.rlhf.compute import distributed
from tests.programs import test_token_tables as own

with distributed.process_group():
    run = Run(Path(sys.argv[1]))
    made = own.encoder()
    found = own.read_pairs(run, made)
    result = [[list(c) for c in found], list(made.cut)]
    Path(sys.argv[1], f"rank-{distributed.rank()}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_three_ranks_write_a_part_each_and_all_read_the_whole(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    log = tmp_path / "log.txt"
    ranks = forked.start([*agent, str(tmp_path / "ranks.py"), str(run.directory)], log)
    assert ranks.wait() == 0, log.read_text()[-3000:]
    own = encoder()
    wanted = comparisons.encode_with(own, comparisons.from_pairs(rows_of(run, "reward")))
    as_json = json.loads(json.dumps([[list(c) for c in wanted], list(own.cut)]))
    for rank in range(3):
        assert json.loads((run.directory / f"rank-{rank}.json").read_text()) == as_json
    (folder,) = folders(tmp_path)
    assert len([*folder.glob("part-*-of-00003.arrow")]) == 3
    forbid_encoding(monkeypatch)  # one process reads what three have written
    assert list(read_pairs(run, encoder())) == wanted


# ----------------------------------------------------------------------------------------- columns


def numbers_table(sizes: list[int]) -> TokenTable[list[int]]:
    batches, first = [], 0
    for size in sizes:
        values = [[row] * (row % 4) for row in range(first, first + size)]
        batches.append(pa.RecordBatch.from_pydict({"ids": values}, pa.schema({"ids": pa.list_(pa.int32())})))
        first += size
    return TokenTable(batches, lambda batch: to_lists(batch["ids"]))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), max_size=5), st.data())
def test_a_table_is_the_list_of_its_items(sizes: list[int], data: st.DataObject) -> None:
    table = numbers_table(sizes)
    items = [[row] * (row % 4) for row in range(sum(sizes))]
    assert (len(table), list(table)) == (len(items), items)
    chosen = data.draw(st.lists(st.integers(0, max(0, len(items) - 1)), max_size=8 if items else 0))
    some = table.select(chosen)
    assert list(some) == [items[index] for index in chosen] == [some[i] for i in range(len(some))]
    assert some.lengths("ids") == [len(items[index]) for index in chosen]
    assert some.column("ids") == [items[index] for index in chosen]
    bounds = data.draw(st.slices(max(1, len(items))))
    assert list(table[bounds]) == items[bounds]


def test_lists_of_lists_and_of_nothing() -> None:
    nested = [[[1, 2], []], [], [[3]]]
    array = pa.array(nested, pa.list_(pa.list_(pa.int32())))
    assert to_lists(array) == nested
    assert to_lists(array.slice(1, 2)) == nested[1:]
    assert to_lists(array.slice(3)) == []
    assert to_lists(pa.array([[True, None], []], pa.list_(pa.bool_()))) == [[True, None], []]
