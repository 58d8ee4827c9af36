"""The questions and answers that the user brings: found, checked, and fetched when they are a hub id."""

import os
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.hub import fetched, is_hub_id
from tasks.config.dump_files import DUMP_ENDINGS, UNKNOWN_SITE, find_sites, users_beside
from tasks.config.pipeline import Pipeline
from tasks.config.sources import HhRlhf, HubSource, ShellSite, StackExchangeDump
from tasks.system.errors import InputError

WANTED = ["*.jsonl", "*.json", "*.parquet", "*.arrow", "*.jsonl.gz", "*.json.gz"]

OTHER_FILES = [
    "red-team-attempts/*"
]  # of hh-rlhf: whole attempts with one rating each, no pairs of dialogues


def given_corpus(source: StackExchangeDump | HubSource) -> Artifact:
    """The file or folder as an input of stages."""
    return user_artifact(corpus_place(source))


def with_site(config: Pipeline, source: Artifact) -> Pipeline:
    """Return the settings with the site that the dump's name says: a name is no part of the content that an artifact is known by."""
    if not isinstance(config.source, StackExchangeDump) or config.source.site:
        return config
    sites = set(find_sites(Path(source["path"]), "").values())
    if len(sites) > 1 or UNKNOWN_SITE in sites:
        return config
    return config.model_copy(update={"source": config.source.model_copy(update={"site": sites.pop()})})


def users_of(about: StackExchangeDump | HubSource | ShellSite, source: Artifact) -> dict[str, Artifact]:
    """Return the users beside a dump that is a file as an input of the data stage; in an archive or a folder they are part of the source."""
    place = Path(source["path"])
    if not isinstance(about, StackExchangeDump) or not place.is_file():
        return {}
    users = users_beside(place)
    return {"users": user_artifact(users)} if users else {}


def evaluation_sets(config: Pipeline) -> dict[str, Artifact]:
    """The files of data.decontaminate_against as inputs of the data stage."""
    return {
        f"against{number}": user_artifact(_evaluation_set(Path(path).expanduser()))
        for number, path in enumerate(config.data.decontaminate_against)
    }


def _evaluation_set(place: Path) -> Path:
    if not place.exists() or not os.access(place, os.R_OK):
        raise InputError(f"data.decontaminate_against: there is no file or folder {place} that can be read")
    return place


def corpus_place(source: StackExchangeDump | HubSource) -> Path:
    """Where it lies; what the setting names on the hub is downloaded first. Raises InputError."""
    place = Path(source.path).expanduser()
    if isinstance(source, StackExchangeDump):
        if not place.exists():
            raise InputError(f"source.path: there is no file or folder {place}")
        if not os.access(place, os.R_OK):
            raise InputError(
                f"source.path: {place} cannot be read; name a file whose name ends in {DUMP_ENDINGS}, or a folder of them"
            )
        find_sites(place, source.site)
    elif not place.exists():
        if not is_hub_id(source.path):
            raise InputError(f"source.path: there is no file or folder {place}")
        wanted = [source.files] if source.files else WANTED
        unwanted = OTHER_FILES if isinstance(source, HhRlhf) and not source.files else None
        place = fetched(
            str(place),
            "dataset",
            revision=source.revision,
            wanted=wanted,
            unwanted=unwanted,
            setting="source.path",
        )
    return place
