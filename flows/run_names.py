"""Names of flow runs: the profile, the date and a short key of the settings, unless the user has typed one."""

import re
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import coolname
from coolname.loader import load_config
from prefect.runtime import flow_run
from pydantic_core import to_jsonable_python

from tasks.system.hashing import digest_of

KEY_LENGTH = 6
# what the form of Prefect's pages proposes: a star, "beta3-orionis", or a Greek letter and another name
GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
PROPOSED = re.compile(rf"(?:{GREEK})\d*(?:-[a-z]+)+")


def name_run() -> str:
    """Return the name of the flow run that begins: the one that the user has typed, else a telling one."""
    return _name("")


def name_retraining() -> str:
    """Return the name of a retraining that begins."""
    return _name("retrain ")


def _name(before: str) -> str:
    typed = str(flow_run.name or "")
    if typed and not is_random(typed):
        return typed
    parameters: dict[str, Any] = flow_run.parameters
    key = digest_of(
        to_jsonable_python(
            {name: value for name, value in parameters.items() if name != "profile"}, fallback=str
        )
    )
    return f"{before}{parameters.get('profile', 'rlhf')} {datetime.now().astimezone():%Y-%m-%d %H:%M} {key[:KEY_LENGTH]}"


def is_random(name: str) -> bool:
    """Return whether Prefect has made up the name: its server, its client or the form of its pages."""
    return bool(PROPOSED.fullmatch(name)) or (name.count("-") == 1 and set(name.split("-")) <= _words())


@cache
def _words() -> set[str]:
    """Return all words of which Prefect makes names."""
    lists: dict[str, dict[str, Any]] = load_config(str(Path(coolname.__file__).parent / "data"))
    return {str(word) for one in lists.values() for word in one.get("words") or ()}
