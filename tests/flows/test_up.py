"""Test `alignflow up` without its servers: credentials, addresses, refusals, processes that die.

tests/servers/test_operations.py starts the real ones.
"""

import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.commands import up
from flows.commands.up import Supervisor
from flows.services import credentials, local_servers, log_rotation
from flows.services.local_servers import Address, Process
from flows.services.processes import ServerFailed
from tasks.system import locks


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "home"
    (made / "logs").mkdir(parents=True)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(made))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made / 'mlflow.db'}")
    return made


def test_credentials_are_made_once_at_random_and_for_their_owner_only(tmp_path: Path) -> None:
    os.umask(0o022)
    first = credentials.load_or_create(tmp_path)
    assert credentials.load_or_create(tmp_path) == first
    assert credentials.load_or_create(tmp_path / "other") != first
    assert len(first.password) >= 32
    assert stat.S_IMODE(credentials.file_of(tmp_path).stat().st_mode) == 0o600
    assert first.clients["PREFECT_API_AUTH_STRING"] == f"alignflow:{first.password}"


def test_no_server_has_its_password_on_the_command_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(local_servers.DATABASE, "postgresql://me:secret@127.0.0.1:5432")
    login = credentials.load_or_create(home)
    parts = local_servers.servers(home, Address("http://127.0.0.1:1", "http://127.0.0.1:2"), login)
    lines = " ".join(word for part in parts for word in part.command)
    assert login.password not in lines
    assert "secret" not in lines
    prefect, mlflow = (part.environment for part in parts)
    assert (
        prefect["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
        == "postgresql+asyncpg://me:secret@127.0.0.1:5432/prefect"
    )
    assert mlflow["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://me:secret@127.0.0.1:5432/mlflow"
    assert (
        prefect["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"]
        == prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
        == "http://127.0.0.1:1"
    )
    assert prefect["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert stat.S_IMODE((home / "mlflow-auth.ini").stat().st_mode) == 0o600
    assert all("0.0.0.0" not in part.command for part in parts)


@pytest.mark.parametrize(
    "url", ["mysql://me@host", "postgresql://", "postgresql://me@host/prefect", "host:5432"]
)
def test_a_database_that_is_no_postgresql_server_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys, url: str
) -> None:
    monkeypatch.setenv(local_servers.DATABASE, url)
    assert cli.main(["up", "--prefect-port", "0", "--mlflow-port", "0"]) == 2
    assert "postgresql://USER:PASSWORD@HOST:PORT" in capsys.readouterr().err
    assert not (home / "up.json").exists()


def test_a_port_that_is_taken_is_told_before_anything_starts(home: Path, capsys) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert cli.main(["up", "--mlflow-port", str(port), "--prefect-port", "0"]) == 2
    assert (
        f"Port {port} is taken by another program; --mlflow-port names another one" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", [["deploy"], ["work", "gpu"], ["landed", "demo", "."]])
def test_what_needs_a_server_says_so_where_there_is_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: list[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert cli.main(command) == 2
    assert "There is no Prefect server to use" in capsys.readouterr().err


def test_servers_count_as_running_only_while_somebody_holds_them_up(home: Path) -> None:
    address = Address("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert local_servers.find_running(home) is None
    with locks.acquire(home / "locks" / "up.lock"):
        assert local_servers.find_running(home) is None  # still starting
        (home / "up.json").write_text(json.dumps(address._asdict()))
        assert local_servers.find_running(home) == address
    assert local_servers.find_running(home) is None  # killed: the file is still there


def test_a_parts_log_is_rotated_by_the_one_process_that_writes_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_rotation, "MAX_BYTES", 1000)
    supervisor = Supervisor(home)
    supervisor.start(Process("loud", [sys.executable, "-c", "for n in range(300): print('line', n)"], {}))
    supervisor.children["loud"].wait(900)
    supervisor.outputs["loud"].finish()
    files = sorted(path.name for path in (home / "logs").iterdir())
    assert files == ["up-loud.log", "up-loud.log.1", "up-loud.log.2"]
    assert all(path.stat().st_size <= 1000 for path in (home / "logs").iterdir())
    assert (home / "logs" / "up-loud.log").read_text().endswith("line 299\n")


@pytest.mark.parametrize("text", ["no line end", "", "\\xff\\xfe bytes", "x" * 100_000])
def test_whatever_a_part_prints_is_in_its_log(home: Path, text: str) -> None:
    supervisor = Supervisor(home)
    supervisor.start(
        Process("odd", [sys.executable, "-c", f"import sys; sys.stdout.buffer.write(b'{text}')"], {})
    )
    supervisor.children["odd"].wait(900)
    supervisor.outputs["odd"].finish()
    log = home / "logs" / "up-odd.log"
    written = log.read_text().replace("\n", "") if log.exists() else ""
    assert written == text.replace("\\xff\\xfe", "\ufffd\ufffd")


def test_what_dies_is_started_again_and_what_dies_again_and_again_is_given_up(home: Path) -> None:
    supervisor, said = Supervisor(home), []
    supervisor.start(Process("short", [sys.executable, "-c", "print('hello')"], {}))
    for _ in range(up.MOST_RESTARTS):
        supervisor.children["short"].wait(900)
        supervisor.revive(said.append)
    supervisor.children["short"].wait(900)
    with pytest.raises(ServerFailed, match="short stops again and again"):
        supervisor.revive(said.append)
    assert len(said) == up.MOST_RESTARTS
    assert (home / "logs" / "up-short.log").read_text().count("hello") == up.MOST_RESTARTS + 1
