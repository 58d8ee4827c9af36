"""Atomic writes: the old file or the new one, never a part."""

import stat
import threading
from pathlib import Path

import pytest

from tasks.system import files
from tasks.system.files import replace_text, replacing


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "a.txt", []
    sync_path = files.sync_path

    def sync(temporary: Path) -> None:
        order.append((temporary.read_text(), path.exists()))
        sync_path(temporary)

    monkeypatch.setattr(files, "sync_path", sync)
    replace_text(path, "new")
    assert order == [("new", False)]
    assert path.read_text() == "new"


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("x")
    temporary.write_text("half of it")  # by another process that had the same id
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert not temporary.exists()


def test_an_existing_file_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with replacing(path, keep_existing=True) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]


def test_a_private_file_is_its_owners_from_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    monkeypatch.setattr(files, "sync_path", lambda path: modes.append(stat.S_IMODE(path.stat().st_mode)))
    replace_text(tmp_path / "secret.json", "{}", private=True)
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "secret.json").stat().st_mode) == 0o600


def test_two_threads_that_write_at_once_do_not_mix(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.txt", ["a" * 200_000, "b" * 200_000]
    threads = [threading.Thread(target=replace_text, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert [found.name for found in tmp_path.iterdir()] == ["a.txt"]
