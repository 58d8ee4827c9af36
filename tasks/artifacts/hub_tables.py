"""Fetch a part of a data set in the layout of the Hugging Face hub as local parquet files.

A program fetches it, by `datasets`. The files are kept in the home and used again without network.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.artifact import content_digest
from tasks.artifacts.code_version import PROGRAMS, ROOT
from tasks.artifacts.hub import check_hub_id
from tasks.artifacts.store import home
from tasks.config.sections.sources import HubSource
from tasks.system.errors import DiskFailure, InputError, StageFailed, refusing_disk_failures
from tasks.system.files import replace_text
from tasks.system.hashing import digest_of
from tasks.system.locks import acquire
from tasks.system.processes import die_with_parent

COMMIT = re.compile(r"[0-9a-f]{40}")
FORMAT = 1  # of the tables; raise it when other rows, columns or file names are written
PATTERN = "[*?"  # characters by which `datasets` takes a folder for a pattern


class State(NamedTuple):
    """A data set, fixed at one state of its files."""

    path: str  # its folder, or its hub id
    commit: str | None  # of a hub id, "" if it is not known; None: a folder
    version: str  # the commit, or the digest of the folder
    no_network: str = ""  # why the hub could not be asked for the commit


def fetch_tables(source: HubSource) -> Path:
    """Return the folder with the rows that source.config, split, columns and take choose.

    Raises InputError.
    """
    settings = source.model_dump(include={"config", "split", "columns", "take"}, mode="json")
    given = digest_of([source.path, source.revision, settings])[:16]
    last_commit = home() / "hub" / f"{given}.commit"
    state = _find_state(source, last_commit)
    name = Path(state.path).name if state.commit is None else state.path.replace("/", "--")
    tables = home() / "hub" / f"{name}-{digest_of([FORMAT, state.path, state.version, settings])[:16]}"
    with _locked(tables):
        if not tables.is_dir():
            if state.no_network:
                raise InputError(
                    f"source.path: the hub cannot be asked for {source.path} ({state.no_network}), and "
                    "nothing is cached for these settings: connect to the network once, or name a folder"
                )
            with refusing_disk_failures(tables.parent):
                _write_tables({"path": state.path, "commit": state.commit} | settings, tables)
        os.utime(tables)  # `alignflow gc` keeps what was used lately
    if state.commit and not state.no_network:
        replace_text(last_commit, state.commit)
    return tables


def _find_state(source: HubSource, last_commit: Path) -> State:
    """Digest a folder, or ask the hub for the commit of a branch or tag. Raises InputError."""
    place = Path(source.path).expanduser()
    if place.is_dir():
        place = place.resolve()
        if any(character in str(place) for character in PATTERN):
            raise InputError(
                f"source.path: {place} has a character of a pattern, one of {' '.join(PATTERN)}: rename it, "
                "or leave out source.config, split, columns and take"
            )
        return State(str(place), None, content_digest(place))
    if place.exists():
        raise InputError(
            f"source.path: {place} is a file; source.config, split, columns and take need a folder"
        )
    check_hub_id(source.path, "dataset", setting="source.path")
    commit, no_network = source.revision or "", ""
    if not COMMIT.fullmatch(commit):
        try:
            commit = _ask_for_commit(source.path, source.revision)
        except OSError as error:
            commit = last_commit.read_text() if last_commit.exists() else ""
            no_network = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return State(source.path, commit, commit, no_network)


def _ask_for_commit(hub_id: str, revision: str | None) -> str:
    """Return the commit of a branch or tag. Raises InputError, and OSError without network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(hub_id, revision=revision).sha
    except RevisionNotFoundError as error:
        raise InputError(f"source.revision: {hub_id} has no revision {revision} on the hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"source.path: {hub_id} is neither a folder here nor a data set on the hub that you may read"
        ) from error
    except HTTPError as error:  # of the HTTP library of this version of huggingface_hub
        raise ConnectionError(str(error)) from error
    assert commit, hub_id
    return commit


@contextmanager
def _locked(tables: Path) -> Iterator[None]:
    """Hold the lock of the tables, so that of two processes one fetches them."""
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with acquire(locks / f"{lock_name(tables.name)}.lock"):
        yield


def lock_name(tables: str) -> str:
    """Return the name of the lock of tables."""
    return f"hub-{tables}"


def _write_tables(choice: dict[str, Any], tables: Path) -> None:
    """Have the program write the rows; a killed process leaves no half of them.

    Raises InputError, DiskFailure and StageFailed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise InputError(
            "source.config, split, columns and take need the package datasets: pip install 'alignflow[train]'"
        )
    unfinished = tables.with_name(f".{tables.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        command = [
            sys.executable, "-m", f"{PROGRAMS}.data_stage.hub_rows", str(unfinished), json.dumps(choice),
        ]  # fmt: skip
        die = partial(die_with_parent, os.getpid())
        done = subprocess.run(
            command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            check=False, preexec_fn=die,
        )  # fmt: skip
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        if done.returncode == 2:
            raise InputError(last)
        if done.returncode == 3:
            raise DiskFailure(last)
        if done.returncode:
            raise StageFailed(f"{choice['path']} could not be fetched: {last}")
        os.replace(unfinished, tables)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _environment() -> dict[str, str]:
    """Return the variables of the program, which downloads as this process does: with its token and proxy."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
