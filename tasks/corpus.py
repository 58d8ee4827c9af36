"""The questions and answers that the user brings: found, checked, and fetched when they are a hub id."""

import os
from pathlib import Path

from tasks.artifact import Artifact, given
from tasks.hub import fetched, is_hub_id
from tasks.programs.config import DUMPS, HhRlhf, HubSource, InputError, Pipeline, StackExchangeDump

WANTED = ["*.jsonl", "*.json", "*.parquet", "*.arrow", "*.jsonl.gz", "*.json.gz"]

OTHER_FILES = ["red-team-attempts/*"]  # of hh-rlhf: whole attempts with one rating each, no pairs of dialogues


def given_corpus(source: StackExchangeDump | HubSource) -> Artifact:
    """The file or folder as an input of stages."""
    return given(corpus_place(source))


def evaluation_sets(config: Pipeline) -> dict[str, Artifact]:
    """The files of data.against as inputs of the data stage."""
    return {f"against{number}": given(_evaluation_set(Path(path).expanduser())) for number, path in enumerate(config.data.against)}


def _evaluation_set(place: Path) -> Path:
    if not place.exists() or not os.access(place, os.R_OK):
        raise InputError(f"data.against: there is no file or folder {place} that can be read")
    return place


def corpus_place(source: StackExchangeDump | HubSource) -> Path:
    """Where it lies; what the setting names on the hub is downloaded first. Raises InputError."""
    place = Path(source.path).expanduser()
    if isinstance(source, StackExchangeDump):
        if not place.exists():
            raise InputError(f"source.path: there is no file or folder {place}")
        if not os.access(place, os.R_OK):
            raise InputError(f"source.path: {place} cannot be read; name a .7z, Posts.xml, Posts.csv or Posts.csv.gz, or a folder of them")
        if place.is_dir() and not any(file.name.endswith(DUMPS) for file in place.rglob("*")):
            raise InputError(f"source.path: {place} holds no file that ends in {', '.join(DUMPS)}; name a dump, or a folder of them")
    elif not place.exists():
        if not is_hub_id(source.path):
            raise InputError(f"source.path: there is no file or folder {place}")
        wanted = [source.files] if source.files else WANTED
        unwanted = OTHER_FILES if isinstance(source, HhRlhf) and not source.files else None
        place = fetched(str(place), "dataset", revision=source.revision, wanted=wanted, unwanted=unwanted, setting="source.path")
    return place
