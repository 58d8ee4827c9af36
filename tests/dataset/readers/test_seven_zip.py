"""Dumps as they are published: 7z archives, read without unpacking."""

import io
import random
import threading
import tracemalloc
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import py7zr
import pytest

from tasks.dataset.readers import blocks
from tasks.dataset.readers.dump_tables import iter_blocks
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.system.errors import InputError
from tests.support.dumps import iter_posts

ROW = '<row Id="{0}" PostTypeId="1" Score="3" Title="t {0}" Body="&lt;p&gt;{1} says {0}&lt;/p&gt;" />'
ROWS = "\n".join(ROW.format(n, n * 7919) for n in range(1, 3001))
POSTS = f"<posts>\n{ROWS}\n</posts>".encode()
OTHERS = {
    "Badges.xml": b"<badges/>" * 1000,
    "PostHistory.xml": random.Random(0).randbytes(50_000),
    "Users.xml": b"<users/>",
}


def packed(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with py7zr.SevenZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writef(io.BytesIO(content), name)
    return path


def read(path: Path) -> list[Post]:
    return list(iter_posts(path))


@pytest.mark.parametrize("name", ["Posts.xml", "travel.stackexchange.com/Posts.xml"])
def test_posts_of_an_archive_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "Posts.xml").write_bytes(POSTS)
    found = read(packed(tmp_path / "site.7z", {**OTHERS, name: POSTS}))
    assert len(found) == 3000
    assert found == read(tmp_path / "Posts.xml")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["Posts.xml", "site.7z"]


def test_an_odd_row_in_an_archive_costs_no_more_than_itself(tmp_path: Path) -> None:
    odd = POSTS.replace(b"79190 says", b"79190 &#x0E;says\x1b").replace(b"87109 says", b"87109 & says")
    bad = Quarantine()
    found = list(iter_posts(packed(tmp_path / "site.7z", {"Posts.xml": odd}), Counter(), bad))
    assert [post.id for post in found] == [n for n in range(1, 3001) if n != 11]
    assert found[9].body == "<p>79190 says 10</p>"
    assert bad.reasons == {"rows that are not well-formed XML": 1}


@pytest.mark.parametrize("name", ["../../Posts.xml", "/tmp/alignflow-test/Posts.xml", "a/../../Posts.xml"])
def test_a_name_that_leads_out_of_the_archive_leads_nowhere(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(py7zr.py7zr, "check_archive_path", lambda _: True)  # it would not write such names
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = packed(folder / "site.7z", {name: POSTS})
    with suppress(
        InputError
    ):  # to read the one file that is wanted, or to refuse the archive, are both right
        assert len(read(path)) == 3000
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "site.7z"]
    assert not Path("/tmp/alignflow-test").exists()


def test_progress_ends_at_the_archives_size(tmp_path: Path) -> None:
    path = packed(tmp_path / "site.7z", {"Posts.xml": POSTS})
    done = [block.bytes_read for block in iter_blocks(path)]
    assert done
    assert all(0 < bytes_read <= path.stat().st_size for bytes_read in done)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (OTHERS, "holds no Posts.xml"),
        ({"a/Posts.xml": POSTS, "b/Posts.xml": POSTS}, "holds 2 Posts.xml"),
        ({"Posts.xml": b"<badges/>"}, "XML but not a Posts.xml"),
        ({"Posts.xml": POSTS[:-2000]}, "damaged, truncated or not a Posts.xml"),
    ],
)
def test_archives_without_one_dump_are_refused(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(packed(tmp_path / "site.7z", members))


def test_damaged_and_encrypted_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7z archive"):
        read(packed(tmp_path / "secret.7z", {"Posts.xml": POSTS}, password="secret"))
    content = packed(tmp_path / "site.7z", {**OTHERS, "Posts.xml": POSTS}).read_bytes()
    rng = random.Random(0)
    for case in range(60):
        place = rng.randrange(8, len(content))
        broken = (
            content[:place]
            if case % 2
            else content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
        )
        (tmp_path / "broken.7z").write_bytes(broken)
        with pytest.raises(InputError) as refused:
            read(tmp_path / "broken.7z")
        assert len(str(refused.value).splitlines()) == 1


def test_whoever_stops_reading_leaves_no_thread_behind(tmp_path: Path) -> None:
    path = packed(
        tmp_path / "site.7z", {"Posts.xml": b"<posts>%b</posts>" % (ROW.format(1, "x").encode() * 30_000)}
    )
    before = threading.active_count()
    posts = iter_posts(path)
    next(posts)
    posts.close()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and "_pump" in repr(thread):
            thread.join(10)
    assert threading.active_count() == before


def test_memory_does_not_grow_with_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**18)
    rng, peaks = random.Random(0), []
    for count in (2_000, 20_000):
        rows = "\n".join(ROW.format(n, rng.randbytes(400).hex()) for n in range(1, count + 1))
        path = packed(
            tmp_path / f"{count}.7z",
            {"Posts.xml": f"<posts>{rows}</posts>".encode()},
            filters=[{"id": py7zr.FILTER_DEFLATE}],
        )
        del rows
        tracemalloc.start()
        assert sum(1 for _ in iter_posts(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] + 2**20, peaks
