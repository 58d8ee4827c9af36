"""The questions and answers that the user brings: found, checked, and fetched when they are a hub id."""

import os
from pathlib import Path

from tasks.artifact import Artifact, given
from tasks.hub import fetched, is_hub_id
from tasks.programs.config import HubSource, InputError, StackExchangeDump

WANTED = ["*.jsonl", "*.json", "*.parquet", "*.jsonl.gz", "*.json.gz"]


def given_corpus(source: StackExchangeDump | HubSource) -> Artifact:
    """The file or folder as an input of stages."""
    return given(corpus_place(source))


def corpus_place(source: StackExchangeDump | HubSource) -> Path:
    """Where it lies; what the setting names on the hub is downloaded first. Raises InputError."""
    place = Path(source.path).expanduser()
    if isinstance(source, StackExchangeDump):
        if not place.exists():
            raise InputError(f"source.path: there is no file {place}")
        if not place.is_file() or not os.access(place, os.R_OK):
            raise InputError(f"source.path: {place} is not a file that can be read; name a .7z, Posts.xml, Posts.csv or Posts.csv.gz")
    elif not place.exists():
        if not is_hub_id(source.path):
            raise InputError(f"source.path: there is no file or folder {place}")
        wanted = [source.files] if source.files else WANTED
        place = fetched(str(place), "dataset", revision=source.revision, wanted=wanted, setting="source.path")
    return place
