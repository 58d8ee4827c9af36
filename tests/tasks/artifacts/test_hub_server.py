"""Test that a part of a data set is fetched from a hub, here a local server, and used again without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.artifacts.corpus import find_corpus
from tasks.config.sections.sources import OwnRows
from tasks.system.errors import InputError
from tests.tasks.artifacts.hub_server import serve_hub, use_hub

CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/train-*}\n---\n"


class Hub(NamedTuple):
    """A hub with the data set somebody/questions."""

    folder: Path  # of the data set
    requests: list[str]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "sets/somebody/questions"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for number in range(2):
        write_rows(folder / f"data/train-{number}.parquet", f"q{number}")
    with serve_hub(tmp_path / "sets") as (address, requests):
        use_hub(monkeypatch, address)
        monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        yield Hub(folder, requests)


def write_rows(path: Path, word: str) -> None:
    rows = [{"prompt": f"{word} {n}", "completion": "a", "extra": n} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), path)


def prompts(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.parquet"))
    return [prompt for file in files for prompt in pq.read_table(file)["prompt"].to_pylist()]


def test_the_first_rows_are_fetched_and_used_again_without_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OwnRows(path="somebody/questions", split=("train",), columns=("prompt",), take=2)
    first = find_corpus(source)
    assert [path.relative_to(first).as_posix() for path in first.rglob("*.parquet")] == [
        "train/data/train-0.parquet"
    ]
    assert prompts(first) == ["q0 0", "q0 1"]
    assert not any("train-1" in request for request in hub.requests if request.startswith("GET /datasets"))
    num_requests = len(hub.requests)
    assert find_corpus(source) == first
    assert len(hub.requests) == num_requests + 1  # for the commit

    write_rows(hub.folder / "data/train-0.parquet", "new")
    second = find_corpus(source)
    assert (prompts(second), prompts(first)) == (["new 0", "new 1"], ["q0 0", "q0 1"])

    use_hub(monkeypatch, "http://127.0.0.1:9")
    assert find_corpus(source) == second
    with pytest.raises(
        InputError, match=r"source.path: the hub cannot be asked for somebody/questions .*cached"
    ):
        find_corpus(source.model_copy(update={"take": 3}))


def test_a_commit_needs_no_network_once_it_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    source = OwnRows(path="somebody/questions", take=4)
    find_corpus(source)
    (commit,) = (file.read_text() for file in hub.folder.parents[2].glob("home/hub/*.commit"))
    fixed = source.model_copy(update={"revision": commit})
    use_hub(monkeypatch, "http://127.0.0.1:9")
    assert prompts(find_corpus(fixed)) == ["q0 0", "q0 1", "q0 2", "q1 0"]


def test_an_unknown_id_or_revision_is_refused(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"source.path: somebody/else is neither a folder here nor"):
        find_corpus(OwnRows(path="somebody/else", take=1))
    with pytest.raises(InputError, match=r"source.revision: somebody/questions has no revision v2"):
        find_corpus(OwnRows(path="somebody/questions", revision="v2", take=1))
    with pytest.raises(InputError, match=r"source.config: somebody/questions has no config x; it has main"):
        find_corpus(OwnRows(path="somebody/questions", config="x"))
    assert hub.requests
