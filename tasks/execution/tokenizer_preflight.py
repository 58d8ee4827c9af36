"""Refuse a tokenizer or a chat template that no stage could use, before anything runs."""

import hashlib
import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tasks.artifacts.code_version import PROGRAMS, source_digests
from tasks.artifacts.store import home
from tasks.config.machine import Machine
from tasks.config.sections.models import Text
from tasks.execution.program_environment import program_environment
from tasks.system.errors import InputError, StageFailed
from tasks.system.files import replace_text
from tasks.system.hashing import file_digest

FILES = ("*.json", "*.jinja", "*.model", "*.txt", "chat_templates/*")
SECONDS = 300


def check_tokenizer(folder: Path, text: Text) -> None:
    """Encode a question and an answer with the tokenizer in ``folder``, in a process of its own. Raises
    InputError.

    A success is recorded in the home under a hash of the tokenizer's files and of our code, and not repeated.
    """
    passed = home() / "checks" / _key(folder, text)
    if passed.exists() or importlib.util.find_spec("transformers") is None:
        return
    command = [
        sys.executable,
        "-m",
        f"{PROGRAMS}.runtime.tokenizer_check",
        str(folder.absolute()),
        text.template,
        str(text.max_prompt_tokens),
    ]
    try:
        done = subprocess.run(
            command,
            env=program_environment(Machine()),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StageFailed(
            f"The tokenizer in {folder} could not be checked: it took more than {SECONDS} s"
        ) from None
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == 2:
        raise InputError(last.rstrip("."))
    if done.returncode:
        raise StageFailed(f"The tokenizer in {folder} could not be checked: {last}")
    # a home that is not writable: `alignflow plan` works with it, and `alignflow run` reports it
    with suppress(OSError):
        passed.parent.mkdir(parents=True, exist_ok=True)
        replace_text(passed, "")


def _key(folder: Path, text: Text) -> str:
    files = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    contents = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    facts = [contents, source_digests("runtime.tokenizer_check"), text.template, text.max_prompt_tokens]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
