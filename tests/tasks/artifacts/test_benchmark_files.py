"""Test the files of benchmarks: what is read of them, what is refused, and what is in the stage's key."""

import json
from pathlib import Path

import pytest

from flows import extras
from flows.preflight import check_inputs
from flows.profiles import load
from tasks.artifacts.artifact import Artifact
from tasks.config.benchmark_files import benchmark_name, read_benchmark, read_reward_bench
from tasks.stages.benchmarks import benchmarks
from tasks.system.errors import InputError
from tests.support.paths import SHARED

CHOICE = {"query": "2 + 2?", "choices": ["3", "4"], "gold": 1}
CONTINUATION = {"context": "The cat sat on the", "continuation": "mat"}
REWARDED = {"id": "7", "prompt": "Hi", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Focus"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_both_kinds_are_read_with_their_lines(tmp_path: Path) -> None:
    kind, (first, second) = read_benchmark(write(tmp_path / "a.jsonl", CHOICE, "", CHOICE | {"gold": 0}))
    assert kind == "multiple_choice"
    assert (first.line, first.text, first.choices, first.gold) == (1, "2 + 2?", ["3", "4"], 1)
    assert (second.line, second.gold) == (3, 0)
    kind, (only,) = read_benchmark(write(tmp_path / "b.jsonl", CONTINUATION))
    assert (kind, only.text, only.choices, only.gold) == ("continuation", "The cat sat on the", ["mat"], 0)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        (CONTINUATION, "has no query, as the rows before it have"),
        (CHOICE | {"gold": 2}, "has the gold 2, which is not the index of one of its choices"),
        (CHOICE | {"gold": True}, "has the gold True"),
        (CHOICE | {"gold": "B"}, "has the gold 'B'"),
        (CHOICE | {"choices": ["4"]}, "has choices that are not a list of at least two texts"),
        (CHOICE | {"choices": ["4", ""]}, "has choices that are not"),
        (CHOICE | {"query": 4}, "has a query that is not a text"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: object, what: str) -> None:
    path = write(tmp_path / "quiz.jsonl", CHOICE, CHOICE, row)
    with pytest.raises(InputError) as caught:
        read_benchmark(path)
    assert str(caught.value).startswith(f"Line 3 of {path} {what}")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_first_row_of_no_kind_an_empty_file_and_no_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "?"})
    with pytest.raises(
        InputError, match=r"Line 1 of .*\{query, choices, gold\} or \{context, continuation\}"
    ):
        read_benchmark(path)
    with pytest.raises(InputError, match="has no rows"):
        read_benchmark(write(path, ""))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not text in UTF-8"):
        read_benchmark(path)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (REWARDED | {"chosen": []}, "has no chosen that is a list of texts"),
        (REWARDED | {"rejected": "b"}, "has no rejected that is a list of texts"),
        (REWARDED | {"prompt": None}, "has no prompt that is a text"),
        (REWARDED | {"subset": "Ties"}, "is of the subset Ties and has no id of the form ref:N or tied:N"),
    ],
)
def test_a_malformed_row_of_reward_bench_is_named_with_its_line(
    tmp_path: Path, row: object, what: str
) -> None:
    path = write(tmp_path / "rb.jsonl", REWARDED, row)
    with pytest.raises(InputError) as caught:
        read_reward_bench(path)
    assert str(caught.value) == f"Line 2 of {path} {what}."


def test_a_benchmark_is_called_like_its_file() -> None:
    assert benchmark_name(Path("/x/arc_easy.jsonl")) == "arc_easy"
    assert benchmark_name(Path("my set (v2).jsonl")) == "my_set_v2_"


def artifact(stage: str) -> Artifact:
    names = ("evaluation.parquet", "model/config.json", "adapter/a.safetensors", "reward.json")
    return Artifact(
        stage=stage, key=stage, digest=stage, path="", files={name: f"{stage} {name}" for name in names},
        seconds=1, peak_mb=1, cached=True, metrics={}, warnings=[],
    )  # fmt: skip


def key(*settings: str, **others: Artifact) -> str:
    inputs = {"data": artifact("data"), "base": artifact("pretrain"), "model": artifact("merge")}
    return benchmarks.step(load("demo", list(settings)), **inputs, **others).recipe.key


def test_the_key_has_a_files_content_and_name_and_not_its_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one = write(tmp_path / "one" / "quiz.jsonl", CHOICE)
    copy = write(tmp_path / "two" / "quiz.jsonl", CHOICE)
    other_name = write(tmp_path / "two" / "exam.jsonl", CHOICE)
    other_content = write(tmp_path / "quiz.jsonl", CHOICE, CHOICE)
    first = key(f"benchmarks.files=[{one}]")
    assert key(f"benchmarks.files=[{copy}]") == first
    keys = {first, key(), *(key(f"benchmarks.files=[{path}]") for path in (other_name, other_content))}
    assert len(keys) == 4
    with pytest.raises(InputError, match="would both be called quiz"):
        key(f"benchmarks.files=[{one}, {copy}]")


def test_the_key_has_the_policies_that_were_built_and_the_reward_model_only_if_it_is_scored(
    tmp_path: Path,
) -> None:
    alone, reward, policy = key(), artifact("reward"), artifact("ppo")
    assert key(reward=reward) == alone
    assert key(ppo=policy) != alone
    rows = f"benchmarks.reward_bench={write(tmp_path / 'rb.jsonl', REWARDED)}"
    assert key(rows) == alone  # the reward model failed: there is nothing to score
    assert key(rows, reward=reward) != alone


def test_files_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"benchmarks.files: there is no file .*none.jsonl that can be read"):
        check_inputs(load("demo", [f"benchmarks.files=[{tmp_path / 'none.jsonl'}]"]))
    broken = write(tmp_path / "quiz.jsonl", CHOICE, "{")
    with pytest.raises(InputError, match=r"Line 2 of .*quiz.jsonl is not JSON"):
        check_inputs(load("demo", [f"benchmarks.files=[{broken}]"]))
    with pytest.raises(InputError, match=r"Line 2 of .*quiz.jsonl is not JSON"):
        check_inputs(load("demo", [f"benchmarks.reward_bench={write(broken, REWARDED, '{')}"]))
    check_inputs(load("demo", [f"benchmarks.files=[{write(broken, CHOICE)}]"]))


def test_files_need_the_extra_and_perplexity_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "lm_eval" else name)
    extras.check_packages(load("demo", []))
    given = load("demo", [f"benchmarks.files=[{tmp_path / 'quiz.jsonl'}]"])
    with pytest.raises(InputError, match=r"benchmarks.files: lm_eval must be installed .*alignflow\[bench"):
        extras.check_packages(given)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("benchmarks.num_fewshot=[]", "at least one number"),
        ("benchmarks.num_fewshot=[-1]", "none below 0"),
        ("benchmarks.num_fewshot=[2,2]", "names a number twice"),
        ("benchmarks.num_fewshot=[0,50]", "needs num_examples of at least as many"),
    ],
)
def test_numbers_of_examples_are_checked(settings: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        load("demo", [settings])


FILES = {"arc_easy": 2376, "copa": 100, "lambada_openai": 5153, "piqa": 1838, "winogender_mc_male": 60}


@pytest.mark.skipif(not (SHARED / "data" / "benchmarks").is_dir(), reason="no shared/data/benchmarks here")
@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read_whole(name: str) -> None:
    benchmark = read_benchmark(SHARED / "data" / "benchmarks" / f"{name}.jsonl")
    assert len(benchmark.documents) == FILES[name]
    assert benchmark.kind == ("continuation" if name.startswith("lambada") else "multiple_choice")
