"""Files that are written by several threads at once."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tasks.system.files import replace_text


def test_threads_that_replace_the_same_file_do_not_take_each_others(tmp_path: Path) -> None:
    """Stages that run at the same time note the digests of the same inputs."""
    path = tmp_path / "note.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(replace_text, path), map(str, range(200))))
    assert path.read_text().isdigit()
    assert list(tmp_path.iterdir()) == [path]
