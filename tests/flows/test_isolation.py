"""Test that settings for other programs in the user's shell and folder do not reach ours; and the home's
modes.
"""

import os
import stat
import sys
from pathlib import Path

import httpx
import pytest

from flows import cli
from flows.services import environment, isolation, permissions
from flows.services.local_servers import Address
from flows.services.processes import free_port
from tasks.config.machine import Machine
from tasks.execution import program_environment
from tasks.tracking import databases
from tests.support import fake_programs

pytestmark = pytest.mark.slow

SHADOWING = ("asyncio", "json", "logging", "mlflow", "prefect", "uvicorn")
HOSTILE = {
    "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "PREFECT_SERVER_API_AUTH_STRING": "a:b", "PREFECT_API_AUTH_STRING": "c:d", "PREFECT_API_KEY": "k",
    "PREFECT_PROFILE": "none",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://nobody@127.0.0.1:9/x",
    "PREFECT_HOME": "/proc/none",
    "PREFECT_CLIENT_CUSTOM_HEADERS": "{", "MLFLOW_REGISTRY_URI": "http://127.0.0.1:9",
    "MLFLOW_TRACKING_USERNAME": "u",
    "WEB_CONCURRENCY": "3", "UVICORN_PORT": "9", "HF_TOKEN": "hf_secret", "PGPASSWORD": "secret",
}  # fmt: skip


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Give the test an environment of its own, and restore the old one."""
    ours = ("PREFECT_", "MLFLOW_", "ALIGNFLOW_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and "proxy" not in name.lower()
    }
    monkeypatch.setattr(os, "environ", kept)
    return monkeypatch


def test_a_run_is_stopped_by_nothing_that_is_meant_for_other_programs(tmp_path: Path) -> None:
    tree, work, home = (
        fake_programs.make_tree(tmp_path / "tree"),
        tmp_path / "work",
        tmp_path / "a #b?c%41 é" / "home",
    )
    for name in SHADOWING:
        work.mkdir(exist_ok=True)
        (work / f"{name}.py").write_text("raise SystemExit('shadowed by the working folder')")
    for name in ("flows", "tasks"):
        (work / name).mkdir()
        (work / name / "__init__.py").write_text("raise SystemExit('shadowed by the working folder')")
    (work / ".env").write_text(
        "PREFECT_API_URL=http://127.0.0.1:9/api\nPREFECT_SERVER_API_AUTH_STRING=a:b\nPREFECT_API_REQUEST_TIMEOUT=abc\n"
    )
    (work / "prefect.toml").write_text('[api]\nurl = "http://127.0.0.1:9/api"\n')
    (work / "pyproject.toml").write_text('[tool.prefect]\nserver.api.auth_string = "a:b"\n')
    (work / "mine.yaml").write_text("method: dpo\nsource: {kind: stack-exchange, path: Posts.xml}\n")
    (work / "Posts.xml").write_text("<posts/>")
    for stage in fake_programs.STAGES:  # a program that finds a secret fails
        file = tree / "tasks" / "programs" / f"{stage}.py"
        file.write_text(
            file.read_text().replace(
                "STEPS = 5",
                "STEPS = 5\nassert 'HF_TOKEN' not in os.environ and 'PGPASSWORD' not in os.environ",
            )
        )
    chosen = fake_programs.environment(tree, home) | HOSTILE
    os.umask(0o022)
    command = [sys.executable, "-P", "-m", "flows.cli", "run", "mine.yaml", "--summary", "out.json"]
    process = fake_programs.subprocess.run(
        command, cwd=work, env=chosen, capture_output=True, text=True, timeout=900, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert stat.S_IMODE((work / "out.json").stat().st_mode) == 0o644
    assert (home / "mlflow.db").is_file()
    assert (home / "prefect" / "prefect.db").is_file()
    assert [path.name for path in home.parent.parent.iterdir() if path.name.startswith("a ")] == [
        "a #b?c%41 é"
    ]
    assert not [
        path for path in [home, *home.rglob("*")] if path.lstat().st_mode & 0o077 and not path.is_symlink()
    ]


@pytest.mark.parametrize("path", ["/x/a?b/m.db", "/x/a#b/m.db", "/x/a%41b/m.db", "/x/a b é/m.db", "/x/m.db"])
def test_a_databases_address_leads_to_its_file_whatever_the_path_holds(tmp_path: Path, path: str) -> None:
    from sqlalchemy import create_engine, text

    file = tmp_path / path.lstrip("/")
    file.parent.mkdir(parents=True)
    engine = create_engine(databases.address(file))
    with engine.begin() as connection:
        connection.execute(text("create table t (x)"))
    engine.dispose()
    assert [found.name for found in file.parent.iterdir()] == ["m.db"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"HTTP_PROXY": "http://p:1"}, "127.0.0.1,localhost,::1"),
        ({"all_proxy": "http://p:1", "NO_PROXY": "a.org, 127.0.0.1"}, "a.org,127.0.0.1,localhost,::1"),
        (
            {"https_proxy": "http://p:1", "no_proxy": "a.org", "NO_PROXY": "b.org"},
            "a.org,127.0.0.1,localhost,::1",
        ),
        ({}, None),
    ],
)
def test_loopback_is_reached_without_a_proxy(
    clean: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    os.environ.update(given)
    isolation.reach_loopback_directly()
    assert (os.environ.get("NO_PROXY"), os.environ.get("no_proxy")) == (expected, expected)


def test_a_proxy_that_requests_cannot_use_does_not_stop_those_that_need_none(
    clean: pytest.MonkeyPatch,
) -> None:
    os.environ["ALL_PROXY"] = "socks5://127.0.0.1:9"
    clean.setattr(isolation, "find_spec", lambda _: None)
    isolation.reach_loopback_directly()
    httpx.Client().close()
    assert "ALL_PROXY" not in os.environ


@pytest.mark.parametrize(
    ("named", "kept"),
    [
        ({}, {"PREFECT_LOGGING_LEVEL"}),
        ({"PREFECT_API_URL": "", "MLFLOW_TRACKING_URI": ""}, {"PREFECT_LOGGING_LEVEL"}),
        (
            {"PREFECT_API_URL": "http://h/api"},
            {"PREFECT_LOGGING_LEVEL", "PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "WEB_CONCURRENCY"},
        ),
        (
            {"MLFLOW_TRACKING_URI": "http://h"},
            {"PREFECT_LOGGING_LEVEL", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD"},
        ),
    ],
)
def test_settings_stay_only_for_a_server_that_is_named(
    clean: pytest.MonkeyPatch, named: dict[str, str], kept: set[str]
) -> None:
    others = {
        "PREFECT_API_AUTH_STRING": "a:b",
        "MLFLOW_TRACKING_PASSWORD": "p",
        "WEB_CONCURRENCY": "2",
        "PREFECT_LOGGING_LEVEL": "ERROR",
    }
    os.environ.update(others | named)
    before = {*others, *named}
    isolation.leave_out_other_servers()
    assert before & os.environ.keys() == kept
    isolation.leave_out_other_servers(all_of_them=True)
    assert before & os.environ.keys() == {"PREFECT_LOGGING_LEVEL"}


def test_the_password_of_up_is_told_to_no_other_tracker(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flows.services import credentials, local_servers

    login = credentials.load_or_create(tmp_path)
    clean.setattr(
        local_servers, "find_running", lambda _: Address("http://127.0.0.1:1", "http://127.0.0.1:2")
    )
    os.environ["MLFLOW_TRACKING_URI"] = "http://elsewhere.example"
    environment.use_running_servers(tmp_path)
    assert login.password not in {value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"


@pytest.mark.parametrize("command", [["run", "demo"], ["deploy"], ["work", "cpu"], ["landed", "demo", "."]])
def test_a_server_that_does_not_answer_is_told_by_the_variable_that_names_it(
    clean: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    clean.setattr("flows.services.processes.RETRIES", 0)
    os.environ |= {
        "PREFECT_API_URL": f"http://me:hidden@127.0.0.1:{free_port()}/api",
        "ALIGNFLOW_HOME": str(tmp_path / "home"),
    }
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("alignflow: The Prefect server that PREFECT_API_URL names, http://127.0.0.1:")
    assert "does not answer" in error
    assert "hidden" not in error
    assert error.count("\n") == 1


def test_addresses_of_files_are_written_out_before_the_working_folder_is_left(
    clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean.chdir(tmp_path)
    for uri, expected in {
        "sqlite:///my.db": f"sqlite:///{tmp_path}/my.db",
        "file:./mlruns": f"file:{tmp_path}/mlruns",
        "mlruns": f"{tmp_path}/mlruns",
        "sqlite:////x/my.db": "sqlite:////x/my.db",
        "file:///x": "file:///x",
        "http://h": "http://h",
        "databricks": "databricks",
    }.items():
        assert isolation._absolute(uri) == expected


# ------------------------------------------------------------------------------------------ secrets


def test_programs_have_nothing_that_opens_a_server_or_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "PREFECT_API_AUTH_STRING", "PREFECT_API_URL", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI",
        "ALIGNFLOW_DATABASE", "PGPASSWORD",
        "ALIGNFLOW_ALERT_WEBHOOK", "ALIGNFLOW_FORK_SERVER", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN",
        "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE",
        "WANDB_API_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_STORAGE_CONNECTION_STRING", "https_proxy",
        "DB_PWD", "SENTRY_DSN", "SSH_AUTH_SOCK", "MY_SECRET", "SMTP_PASSWD", "STRIPE_KEY",
    }  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SOME_SERVICE", "amqp://me:hidden@host/1")
    plain = {
        "PATH",
        "HOME",
        "LANG",
        "PWD",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "NCCL_DEBUG",
        "OMP_NUM_THREADS",
        "HF_HOME",
        "TMPDIR",
    }
    for name in plain:
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    chosen = program_environment.program_environment(Machine())
    assert not chosen.keys() & (secrets | {"SOME_SERVICE"})
    assert plain <= chosen.keys()


# -------------------------------------------------------------------------------------------- modes


def modes(folder: Path) -> set[int]:
    return {
        stat.S_IMODE(path.stat().st_mode) & 0o077
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink()
    }


def test_a_home_is_closed_with_all_that_an_older_version_left_open_and_all_that_comes(tmp_path: Path) -> None:
    os.umask(0o022)
    home, outside = tmp_path / "home", tmp_path / "outside.txt"
    (home / "objects" / "sft" / "key").mkdir(parents=True)
    (home / "objects" / "sft" / "key" / "weights").write_text("x")
    (home / "mlflow.db").write_text("x")
    (home / "demo.json").write_text("x")
    outside.write_text("x")
    (home / "objects" / "link").symlink_to(outside)
    permissions.restrict_to_owner(home)
    assert modes(home) == {0}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o644
    (home / "new").mkdir()
    (home / "new" / "file").write_text("x")
    assert modes(home) == {0}


@pytest.mark.parametrize("what", ["working folder", "sticky"])
def test_a_folder_that_is_not_alignflows_alone_stays_open_but_for_what_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    os.umask(0o022)
    home = tmp_path / "shared"
    (home / "objects").mkdir(parents=True)
    (home / "others.txt").write_text("x")
    if what == "sticky":
        home.chmod(0o1777)
    else:
        monkeypatch.chdir(home)
    permissions.restrict_to_owner(home)
    assert stat.S_IMODE(home.stat().st_mode) & 0o055 == 0o055
    assert stat.S_IMODE((home / "others.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((home / "objects").stat().st_mode) == 0o700
