"""Test that a new home starts with a copy of a prepared database, and never loses one that is there."""

import os
import sqlite3
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from flows.services import environment
from tasks.tracking import databases


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    return tmp_path


def test_a_new_home_gets_a_copy(prefix: Path) -> None:
    target = databases.template("mlflow")
    target.parent.mkdir(parents=True)
    target.write_bytes(b"empty tables")
    databases.lay("mlflow", prefix / "home" / "mlflow.db")
    assert [path.name for path in (prefix / "home").iterdir()] == ["mlflow.db"]
    assert (prefix / "home" / "mlflow.db").read_bytes() == b"empty tables"
    assert target.exists()


@pytest.mark.parametrize(
    ("named", "laid"),
    [
        ({}, {"prefect.db", "mlflow.db"}),
        ({"PREFECT_API_URL": "http://127.0.0.1:1/api", "MLFLOW_TRACKING_URI": "http://127.0.0.1:2"}, set()),
        ({"PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://127.0.0.1/x"}, {"mlflow.db"}),
    ],
    ids=["nothing named", "servers", "PostgreSQL"],
)
def test_a_home_gets_what_no_server_elsewhere_keeps(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], laid: set[str]
) -> None:
    databases.template("mlflow").parent.mkdir(parents=True)
    for tool in ("prefect", "mlflow"):
        databases.template(tool).write_bytes(b"empty tables")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "ALIGNFLOW_"))
    }
    monkeypatch.setattr(os, "environ", kept | named)
    environment.prepare(prefix / "home")
    assert {path.name for path in (prefix / "home").rglob("*.db")} == laid


def test_a_database_that_is_there_stays(prefix: Path) -> None:
    databases.template("prefect").parent.mkdir(parents=True)
    databases.template("prefect").write_bytes(b"empty tables")
    (prefix / "prefect.db").write_bytes(b"years of runs")
    databases.lay("prefect", prefix / "prefect.db")
    assert (prefix / "prefect.db").read_bytes() == b"years of runs"


def test_what_another_process_puts_there_meanwhile_stays(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    databases.template("prefect").parent.mkdir(parents=True)
    databases.template("prefect").write_bytes(b"empty tables")

    def slowly(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())
        (prefix / "prefect.db").write_bytes(b"another's")

    monkeypatch.setattr(databases.shutil, "copyfile", slowly)
    databases.lay("prefect", prefix / "prefect.db")
    assert (prefix / "prefect.db").read_bytes() == b"another's"
    assert not list(prefix.glob("prefect.db.*"))


def test_without_one_prepared_nothing_is_laid(prefix: Path) -> None:
    databases.lay("prefect", prefix / "home" / "prefect.db")
    assert not (prefix / "home").exists()


def test_another_versions_is_not_taken(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    databases.template("prefect").parent.mkdir(parents=True)
    databases.template("prefect").write_bytes(b"empty tables")
    monkeypatch.setattr(databases, "version", lambda tool: version(tool) + ".1")
    databases.lay("prefect", prefix / "prefect.db")
    assert not (prefix / "prefect.db").exists()


@pytest.mark.parametrize(
    ("tool", "scripts"),
    [("prefect", "prefect:server/database/_migrations"), ("mlflow", "mlflow:store/db_migrations")],
)
def test_what_set_up_prepared_is_at_the_tools_last_revision_and_empty(tool: str, scripts: str) -> None:
    if not databases.template(tool).exists():
        pytest.skip("this environment was not made by make setup, which prepares the databases")
    from alembic.config import Config

    config = Config()
    config.set_main_option("path_separator", "os")
    package, folder = scripts.split(":")
    where = Path(__import__(package).__file__).parent / folder
    config.set_main_option("script_location", str(where))
    if tool == "prefect":
        config.set_main_option("version_locations", str(where / "versions" / "sqlite"))
    with closing(sqlite3.connect(databases.template(tool))) as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [
            (ScriptDirectory.from_config(config).get_current_head(),)
        ]
        rows = {name: connection.execute(
            "select count(*) from "
            f"[{name}]"
        ).fetchone()[0] for (name,) in connection.execute(
            "select name from sqlite_master where type = 'table'").fetchall()}  # fmt: skip
    assert len(rows) > 20
    assert {name for name, count in rows.items() if count} <= {"alembic_version", "workspaces"}
