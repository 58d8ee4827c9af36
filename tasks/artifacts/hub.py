"""Download models and data sets from the Hugging Face hub before any program runs."""

import re
from pathlib import Path
from typing import Literal

from tasks.system.errors import InputError

Kind = Literal["model", "dataset"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id, such as owner/name."""
    return not text.startswith(".") and bool(HUB_ID.fullmatch(text))


def download(
    hub_id: str,
    kind: Kind,
    *,
    revision: str | None,
    wanted: list[str],
    unwanted: list[str] | None = None,
    setting: str,
) -> Path:
    """Download the files that match ``wanted`` and not ``unwanted``; return their folder.

    Files that are here already are not downloaded again. Raises InputError, which names ``setting``.
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
        raise _unfetchable(hub_id, kind, setting, error) from error


def check_hub_id(hub_id: str, kind: Kind, *, setting: str) -> None:
    """Refuse an id that no model or data set can have, in the words of `download`. Raises InputError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise _unfetchable(hub_id, kind, setting, error) from error


def _unfetchable(hub_id: str, kind: Kind, setting: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    what = "a folder here nor a model" if kind == "model" else "a file or folder here nor a data set"
    return InputError(f"{setting}: {hub_id} is neither {what} that could be fetched ({reason})")
