"""What lies on the Hugging Face hub: fetched whole, before any program runs, and then a folder like any other."""

import re
from pathlib import Path
from typing import Literal

from tasks.system.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(text: str) -> bool:
    return not text.startswith(".") and bool(HUB_ID.fullmatch(text))


def fetched(
    hub_id: str,
    kind: Literal["model", "dataset"],
    *,
    revision: str | None,
    wanted: list[str],
    unwanted: list[str] | None = None,
    setting: str,
) -> Path:
    """Return the folder with the files that fit ``wanted`` and not ``unwanted``; only those that are not here yet are downloaded.

    Raises InputError, which names ``setting``.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id, repo_type=kind, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "a folder here nor a model" if kind == "model" else "a file or folder here nor a data set"
        raise InputError(f"{setting}: {hub_id} is neither {what} that could be fetched ({reason})") from error
