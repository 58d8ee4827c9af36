"""Test the file that keeps paid replies: what it returns, two processes at once, and damage."""

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.judges.verdict_cache import Reply, VerdictCache, reply_key
from tasks.system.errors import InputError
from tests.support.paths import ROOT

WRITER = """
import sys
from pathlib import Path
from tasks.judges.verdict_cache import Reply, VerdictCache
cache = VerdictCache(Path(sys.argv[1]))
for number in range(200):
    cache.write(f"{sys.argv[2]}-{number}", "m", Reply("text", True, number, 1))
    cache.write(f"both-{number}", "m", Reply(sys.argv[2], True, 1, 1))
"""


def key(**changed: object) -> str:
    usual = {"prompt": "p", "server": "s", "model": "m", "temperature": 0, "max_reply_tokens": 5}
    return reply_key(**(usual | changed))  # type: ignore[arg-type]


def test_a_reply_comes_back_as_it_was_written_and_the_first_one_stays(tmp_path: Path) -> None:
    cache, reply = VerdictCache(tmp_path / "new" / "verdicts.db"), Reply("ja\n\u00fc\x00", False, 12, 3)
    assert cache.read(["k"]) == {}
    cache.write("k", "m", reply)
    cache.write("k", "m", Reply("another", True, 1, 1))
    cache.write("half", "m", Reply("\ud800", True, 1, 1))
    again = VerdictCache(tmp_path / "new" / "verdicts.db")
    assert again.read(["k", "k", "unknown"]) == {"k": reply}
    assert again.read(["half"])["half"].text == "?"
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    for one in (cache, again):
        one.close()


def test_more_keys_than_a_query_takes_are_read(tmp_path: Path) -> None:
    cache = VerdictCache(tmp_path / "verdicts.db")
    for number in range(0, 1201, 400):
        cache.write(str(number), "m", Reply("", True, number, 0))
    assert set(cache.read(map(str, range(1201)))) == {"0", "400", "800", "1200"}
    cache.close()


def test_a_key_depends_on_all_that_a_reply_depends_on() -> None:
    changes: list[dict[str, object]] = [
        {}, {"prompt": "q"}, {"server": "t"}, {"model": "n"}, {"temperature": 0.5}, {"temperature": None},
        {"max_reply_tokens": 6},
    ]  # fmt: skip
    assert len({key(**change) for change in changes}) == len(changes)
    assert key(temperature=0) == key(temperature=0.0)


def test_processes_that_open_and_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.db"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
    assert [writer.wait(900) for writer in writers] == [0, 0, 0]
    cache = VerdictCache(path)
    kept = cache.read([f"{name}-{number}" for name in ("a", "b", "c", "both") for number in range(200)])
    assert len(kept) == 800
    cache.close()
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_file_that_is_no_cache_or_damaged_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.db"
    path.write_bytes(b"something else " * 1000)
    with pytest.raises(InputError, match=r"verdicts\.db cannot be used"):
        VerdictCache(path)
    assert path.read_bytes().startswith(b"something else"), "it is the user's to move away"
