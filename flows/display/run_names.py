"""Name flow runs by profile, date and a short key of the settings, unless the user has typed a name."""

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
# Prefect's form proposes the name of a star, "beta3-orionis", or a Greek letter and another word
GREEK = (
    "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|"
    "nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
)
PROPOSED = re.compile(rf"(?:{GREEK})\d*(?:-[a-z]+)+")


def name_run() -> str:
    """Return the name of the current flow run: what the user has typed, else profile, date and key."""
    return _name("")


def name_retraining() -> str:
    """Return the name of the current retraining."""
    return _name("retrain ")


def name_promotion() -> str:
    """Return the name of the current promotion."""
    return _name("promote ")


def name_rounds() -> str:
    """Return the name of the current run of rounds."""
    return _name("rounds of ")


def _name(prefix: str) -> str:
    typed = str(flow_run.name or "")
    if typed and not is_random(typed):
        return typed
    parameters: dict[str, Any] = flow_run.parameters
    settings = {name: value for name, value in parameters.items() if name != "profile"}
    key = digest_of(to_jsonable_python(settings, fallback=str))
    moment = f"{datetime.now().astimezone():%Y-%m-%d %H:%M}"
    return f"{prefix}{parameters.get('profile') or 'rlhf'} {moment} {key[:KEY_LENGTH]}"


def is_random(name: str) -> bool:
    """Return whether Prefect's server, client or form has made up the name."""
    return bool(PROPOSED.fullmatch(name)) or (name.count("-") == 1 and set(name.split("-")) <= _words())


@cache
def _words() -> set[str]:
    """Return all words that Prefect builds names of."""
    lists: dict[str, dict[str, Any]] = load_config(str(Path(coolname.__file__).parent / "data"))
    return {str(word) for one in lists.values() for word in one.get("words") or ()}
