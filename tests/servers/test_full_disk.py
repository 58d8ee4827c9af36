"""Test disks that refuse a write: full, over quota, read-only, or with a file too large, for each writing
library.
"""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.artifacts import code_version
from tasks.artifacts.artifact import Step, user_artifact
from tasks.artifacts.store import Store
from tasks.config.jobs import PpoJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import program_environment, program_forks
from tasks.execution.run_stage import RunContext, run_stage
from tasks.system.errors import DiskFailure, InputError, disk_failure
from tests.support import fake_programs

pytestmark = pytest.mark.slow

MOUNTS = (
    subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, check=False
    )
    if shutil.which("unshare")
    else None
)
needs_mounts = pytest.mark.skipif(
    MOUNTS is None or MOUNTS.returncode != 0, reason="mounting a small disk is not allowed here"
)

WRITERS = """
import os, resource, sys
from pathlib import Path
import numpy, pyarrow, sqlite3, torch
from pyarrow import parquet
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from tasks.system.errors import disk_failure
from tasks.rlhf.training import checkpoints

many = numpy.random.rand(500_000)
words = {f"w{i}": i for i in range(99_999)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))

def insert(folder):
    database = sqlite3.connect(folder / "x.db")
    database.execute("create table rows (text)")
    database.executemany("insert into rows values (?)", [("x" * 1000,)] * 4000)
    database.commit()

writers = {
    "checkpoint": lambda folder: checkpoints.save(folder / "checkpoints", 1, {"a": torch.from_numpy(many)}),
    "safetensors": lambda folder: save_file({"a": torch.from_numpy(many)}, folder / "x.safetensors"),
    "tokenizer": lambda folder: tokenizer.save(str(folder / "t.json")),
    "parquet": lambda folder: parquet.write_table(pyarrow.table({"a": many}), folder / "x.parquet"),
    "numpy": lambda folder: numpy.save((folder / "x.npy").open("wb"), many),
    "text": lambda folder: (folder / "x.txt").write_text("x" * 4_000_000),
    "sqlite": insert,
}
for kind in sys.argv[2:]:
    folder = Path(sys.argv[1], kind)
    if kind == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    for name, write in writers.items():
        try:
            write(folder)
            print(kind, name, "was written")
        except Exception as error:
            print(kind, name, disk_failure(error, folder))
        if kind == "small":
            os.system(f"rm -rf {folder}/*")
"""
KINDS = ("small", "read-only", "limited") if MOUNTS is not None and MOUNTS.returncode == 0 else ("limited",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disks")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, dict[str, str]]:
    """Return what ``disk_failure`` makes of each library's error, by the kind of disk and by what was
    written.
    """
    for kind in KINDS:
        (folder / kind).mkdir()
    (folder / "writers.py").write_text(WRITERS)
    write = f"exec {sys.executable} -W ignore {folder / 'writers.py'} {folder} {' '.join(KINDS)}"
    mounts = (
        f"mount -t tmpfs -o size=1m none {folder / 'small'} && mount -t tmpfs -o ro none "
        f"{folder / 'read-only'}"
    )
    shell = (
        ["unshare", "-rm", "sh", "-c", f"{mounts} && {write}"] if "small" in KINDS else ["sh", "-c", write]
    )
    environment = os.environ | {"PYTHONPATH": str(fake_programs.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for line in done.stdout.splitlines():
        kind, name, sentence = line.split(" ", 2)
        found[kind][name] = sentence
    assert all(len(sentences) == 7 for sentences in found.values())
    return found


@needs_mounts
def test_a_full_disk_is_known_whatever_writes_to_it(told: dict[str, dict[str, str]], folder: Path) -> None:
    sentences, place = dict(told["small"]), folder / "small"
    assert sentences.pop("numpy").startswith(
        f"A file under {place} could not be written completely: free some space"
    )
    expected = (
        f"The disk under {place} is full: free some space and run the same command again; it goes on from "
        "where it stopped."
    )
    assert set(sentences.values()) == {expected}


@needs_mounts
def test_a_read_only_disk_is_known_whatever_writes_to_it(
    told: dict[str, dict[str, str]], folder: Path
) -> None:
    sentences = dict(told["read-only"])
    assert sentences.pop("sqlite") == "None"  # it says only that it cannot open the database
    assert {text.partition(":")[0] for text in sentences.values()} == {
        f"The file system {folder / 'read-only'} is read-only"
    }


def test_a_limit_of_file_sizes_is_known_whatever_writes(
    told: dict[str, dict[str, str]], folder: Path
) -> None:
    sentences, place = dict(told["limited"]), folder / "limited"
    assert sentences.pop("sqlite") == "None"  # it says only "disk I/O error"
    assert sentences.pop("numpy").startswith(f"A file under {place} could not be written completely")
    assert {text.partition(":")[0] for text in sentences.values()} == {
        f"A file under {place} has reached the largest size allowed"
    }


class WithinAnother:
    """An error that a library raised because of another one, or while it handled it."""

    @staticmethod
    def of(error: Exception, *, explicit: bool) -> Exception:
        try:
            try:
                raise error
            except Exception as cause:
                if explicit:
                    raise RuntimeError("no") from cause
                raise RuntimeError("no")  # noqa: B904
        except RuntimeError as outer:
            return outer


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_cause_is_found_inside_other_errors(tmp_path: Path, number: int, explicit: bool) -> None:
    failure = disk_failure(WithinAnother.of(OSError(number, "no"), explicit=explicit), tmp_path)
    assert isinstance(failure, InputError)
    assert str(failure).endswith(" and run the same command again; it goes on from where it stopped.")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file"),
        RuntimeError("I/O error: No such file or directory (os error 2)"),
        ValueError("28"),
        OSError("12 is not a number of bytes"),
        sqlite3.OperationalError("database is locked"),
    ],
)
def test_other_errors_are_no_disk_failures(tmp_path: Path, error: Exception) -> None:
    assert disk_failure(error, tmp_path) is None


# ------------------------------------------------------------------------------------------- stages


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(code_version, "ROOT", made)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    return made


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("gpu_devices", [(), (os.devnull,)], ids=["forked", "spawned"])
def test_a_log_that_cannot_be_written_does_not_hide_why_a_program_ended(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_devices: tuple[str, ...]
) -> None:
    monkeypatch.setattr(program_environment, "GPU_DEVICES", gpu_devices)
    step = Step("ppo", PpoJob.of(Pipeline()), {"data": user_artifact(tree / "deployments")})
    partial = Store(tmp_path / "home").partial(step.recipe.key)
    partial.mkdir(parents=True)
    (partial / "log.txt").symlink_to("/dev/full")
    with pytest.raises(DiskFailure, match=r"^The disk under .* is full: free some space"):
        run_stage(step, RunContext(Machine()))
    program_forks.stop()
    assert partial.exists()


def test_a_disk_that_is_full_when_a_result_is_stored_does_not_undo_the_work(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    step = Step("ppo", PpoJob.of(Pipeline()), {"data": user_artifact(tree / "deployments")})
    with monkeypatch.context() as patched:
        patched.setattr("tasks.artifacts.store.replace_text", fill)
        with pytest.raises(DiskFailure):
            run_stage(step, RunContext(Machine()))
    fake_programs.misbehave(tree, "ppo", "fail")  # it must not run again
    assert run_stage(step, RunContext(Machine()))["metrics"]["ppo.kl"] == 0.5
    program_forks.stop()


RUN = """
mount -t tmpfs -o size=24m none {disk}
run() {{ {python} -m flows.cli run demo --set method=dpo > $1.out 2> $1.err; echo $?; }}
run first
rm {disk}/home/filler {tree}/tasks/programs/FAKE_sft
run second
"""


@needs_mounts
def test_a_disk_that_fills_up_in_mid_run_is_one_sentence_and_the_next_run_goes_on(tmp_path: Path) -> None:
    tree, disk = fake_programs.make_tree(tmp_path / "tree"), tmp_path / "disk"
    disk.mkdir()
    checks = tree / "flows" / "preflight.py"
    checks.write_text(checks.read_text().replace("LEAST_FREE_MB = 200", "LEAST_FREE_MB = 1"))
    fake_programs.misbehave(tree, "sft", "fill-at 3")
    script = RUN.format(disk=disk, tree=tree, python=sys.executable)
    environment = fake_programs.environment(tree, disk / "home")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["2", "0"], "")
    sentence = (
        f"The disk under {disk} is full: free some space and run the same command again; it goes on from "
        "where it stopped."
    )
    assert (tmp_path / "first.err").read_text() == f"alignflow: {sentence}\n"
    assert (tmp_path / "second.err").read_text() == ""
    assert "sft        goes on from its checkpoint" in (tmp_path / "second.out").read_text()


@needs_mounts
@pytest.mark.parametrize("full", ["home", "elsewhere"])
def test_a_server_that_fails_on_a_full_disk_is_told_as_one(tmp_path: Path, full: str) -> None:
    """Prefect's home is in ours, unless the user names a server and its home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    fail = (
        "import sys; from flows import cli, profiles\ndef fail(*_): raise RuntimeError('500 Internal "
        "Server Error')\nprofiles.load = fail\n"
    )
    fill = (
        f"mount -t tmpfs -o size=1m none {tmp_path / full}; cat /dev/zero > {tmp_path / full}/filler 2> "
        f"{tmp_path}/cat.txt"
    )
    run = f"{sys.executable} -c \"{fail}sys.exit(cli.main(['run', 'demo']))\""
    more = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "elsewhere")}
    environment = fake_programs.environment(fake_programs.ROOT, tmp_path / "home") | more
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{fill}; {run}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"alignflow: The disk under {tmp_path / full} is full: free some space")
    assert done.stderr.count("\n") == 1
