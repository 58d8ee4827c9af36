"""Test `alignflow chat`, `export`, `export-data` and `serve` as a user starts them."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from flows import cli, extras
from flows.commands.usage import named_policies
from tasks.execution.foreground import new_folder
from tasks.system.errors import InputError
from tasks.tracking import databases
from tasks.tracking.client import process_tracker
from tests.programs.usage.tiny_policies import data_tables
from tests.support import tiny
from tests.support.paths import ROOT
from tests.tasks.promotion.finished_runs import make_run

CODES = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which commands change
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_")):
            monkeypatch.delenv(name)
    place = tmp_path / "home"
    os.environ["ALIGNFLOW_HOME"] = str(place)
    named_policies.tracker.cache_clear()
    return place


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.base_folder(tmp_path / "model")


def alignflow(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *arguments]


class Terminal:
    """A program on a terminal of its own, with 100 columns."""

    def __init__(self, *arguments: str) -> None:
        pid, self.descriptor = pty.fork()
        if pid == 0:
            os.environ |= {"COLUMNS": "100", "LINES": "30", "TERM": "xterm", "PYTHONPATH": str(ROOT)}
            os.execv(sys.executable, alignflow(*arguments))
        self.pid, self.shown = pid, ""

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def press_ctrl_c_until(self, pattern: str) -> None:
        """Type Ctrl-C until the pattern is shown: Python's readline loses one between prompt and waiting."""
        for _ in range(20):
            self.type("\x03")
            with suppress(AssertionError):
                self.wait_for(pattern, 10)
                return
        raise AssertionError(self.shown)

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """Return what is shown, once the pattern is there; forget what was shown up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.descriptor], [], [], 0.2)[0]:
                try:
                    read = os.read(self.descriptor, 65536)
                except OSError:  # the program has ended
                    read = b""
                assert read, f"the program has ended: {self.shown}"
                self.shown += CODES.sub("", read.decode(errors="replace"))
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def end(self) -> int:
        """Return the exit status of the program, which must end by itself."""
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.descriptor)
                return os.waitstatus_to_exitcode(status)
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    os.read(self.descriptor, 65536)
                except OSError:
                    time.sleep(0.1)
        os.kill(self.pid, 9)
        raise AssertionError("the program goes on")


def test_a_chat_on_a_terminal(model: Path) -> None:
    terminal = Terminal("chat", str(model), str(model), "--max-tokens", "100", "--temperature", "5")
    assert "model" in terminal.wait_for(r"Ctrl-D ends the chat.*\r\n> ")
    terminal.type("list files\n")
    assert re.search(r"─ model ─+╮╭─ model ─", terminal.wait_for(r"\d+/s ─╯╰─.*╯\r\n> "))
    terminal.press_ctrl_c_until(r"Ctrl-D ends the chat.*\r\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_ends_an_answer_on_a_terminal(tmp_path: Path) -> None:
    model = tiny.model()
    model.config.max_position_embeddings = 10**9  # of a Llama: no weight has this size
    with torch.no_grad():
        model.get_input_embeddings().weight[tiny.EOS] = 0  # tied: the end token is never the likeliest
    model.save_pretrained(tmp_path / "endless")
    tiny.tokenizer().save_pretrained(tmp_path / "endless")
    terminal = Terminal("chat", str(tmp_path / "endless"), "--max-tokens", "9999999", "--temperature", "0")
    terminal.wait_for("> ")
    terminal.type("list\n")
    terminal.wait_for("not ended")
    time.sleep(0.5)
    terminal.type("\x03")
    assert "not ended" in terminal.wait_for(r"╯\r\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_chat_in_a_pipe(model: Path) -> None:
    done = subprocess.run(
        alignflow("chat", str(model), "--seed", "1"),
        input="list files\n\n\udcff[b]x[/b]\n".encode(errors="surrogateescape"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") >= 2
    assert b"\x1b" not in done.stdout


def test_a_reader_that_leaves_ends_the_chat(model: Path) -> None:
    command = " ".join(alignflow("chat", str(model), "--max-tokens", "3"))
    done = subprocess.run(
        ["bash", "-c", f"yes list files | {command} | head -1; echo ${{PIPESTATUS[1]}}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=900,
        check=False,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


def test_an_export_is_there_whole_or_not_at_all(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "policy"
    assert cli.main(["export", str(model), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert {"model.safetensors", "chat_template.jinja"} <= {path.name for path in target.iterdir()}
    assert cli.main(["export", str(model), str(target)]) == 2
    assert "is not empty: name a new one" in capsys.readouterr().err
    (model / "model.safetensors").write_bytes(b"broken")
    other = tmp_path / "other" / "policy"
    assert cli.main(["export", str(model), str(other)]) == 2
    assert "cannot be loaded as a causal language model" in capsys.readouterr().err
    assert not list(other.parent.iterdir())


def test_of_two_exports_to_one_folder_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    target.mkdir()  # an empty one may be there

    def write(folder: Path, text: str) -> None:
        (folder / "artifact").mkdir()
        (folder / "artifact" / "file").write_text(text)

    def write_both() -> None:
        with new_folder(target) as second:
            write(second, "second")
            with new_folder(target) as first:
                write(first, "first")

    with pytest.raises(InputError, match="is not empty"):
        write_both()
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["chat", "nothing:ppo"], r"There are no runs in .*: `alignflow run` makes one"),
        (["export", "MODEL", "new", "--as", "gguf", "--llama-cpp", "."], "--llama-cpp$"),
        (["export", "MODEL", "new", "--as", "adapter"], "is a whole model, not an adapter"),
        (["export", "MODEL", "new", "--base", "x"], "--base goes with --as adapter"),
        (["export", "MODEL", "MODEL"], "is not empty: name a new one"),
        (["export", "MODEL", "MODEL/config.json"], "is a file: name a new folder"),
        (["chat", "MODEL", "--temperature", "-1"], "must be 0 or more"),
    ],
)
def test_refusals(
    arguments: list[str],
    sentence: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(model.parent)
    filled = [one.replace("MODEL", str(model)) for one in arguments]
    try:
        status = cli.main(filled)
    except SystemExit as ended:
        status = int(ended.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(sentence, error.split("; see ")[0].strip()), error
    assert error.count("\n") == 1
    assert not (model.parent / "new").exists()


def test_serving_needs_its_extra(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "serve", ("no_such_package",))
    assert cli.main(["serve", str(model)]) == 2
    assert "no_such_package must be installed here: pip install 'alignflow[serve]'" in capsys.readouterr().err


def test_the_data_of_a_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir()
    databases.lay("mlflow", home / "mlflow.db")
    tracker = process_tracker()
    assert tracker.connect()

    def write(stage: str, folder: Path) -> dict[str, object]:
        if stage == "data":
            data_tables(folder)
        return {"text": {"template": "chat"}} if stage == "sft" else {}

    run = make_run(tracker, 1, write=write)
    assert cli.main(["export-data", str(tmp_path / "trl"), "--run", run.name]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'trl'}\n"
    [row] = pq.read_table(tmp_path / "trl" / "sft" / "train.parquet").to_pylist()
    assert row["prompt"] == [{"content": "How? ", "role": "user"}]
    assert "# Data of the run demo 1" in (tmp_path / "trl" / "README.md").read_text()
