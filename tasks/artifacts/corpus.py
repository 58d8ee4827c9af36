"""Find, check and download the questions and answers that the user brings."""

import os
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.hub import download, is_hub_id
from tasks.artifacts.hub_tables import fetch_tables
from tasks.config.dump_files import DUMP_ENDINGS, UNKNOWN_SITE, find_sites, users_beside
from tasks.config.jobs import DataJob
from tasks.config.pipeline import Pipeline
from tasks.config.sections.sources import HhRlhf, HubSource, ShellSite, StackExchangeDump
from tasks.system.errors import InputError

WANTED = ["*.jsonl", "*.json", "*.parquet", "*.arrow", "*.jsonl.gz", "*.json.gz"]
# in hh-rlhf, these files hold attempts with one rating each, not pairs of dialogues
OTHER_FILES = ["red-team-attempts/*"]


def corpus_artifact(source: StackExchangeDump | HubSource) -> Artifact:
    """Return the file or folder as an input of stages. Raises InputError."""
    return user_artifact(find_corpus(source))


def with_site(job: DataJob, source: Artifact) -> DataJob:
    """Return the job with the site that the dump's name says.

    A file's name is not in the key of an artifact, which covers content only; the setting is.
    """
    if not isinstance(job.source, StackExchangeDump) or job.source.site:
        return job
    sites = set(find_sites(Path(source["path"]), "").values())
    if len(sites) > 1 or UNKNOWN_SITE in sites:
        return job
    return job.model_copy(update={"source": job.source.model_copy(update={"site": sites.pop()})})


def users_artifact(about: StackExchangeDump | HubSource | ShellSite, source: Artifact) -> dict[str, Artifact]:
    """Return the file of users beside a dump as an input of the data stage; nothing if there is none.

    In an archive or a folder the users are a part of the source itself.
    """
    place = Path(source["path"])
    if not isinstance(about, StackExchangeDump) or not place.is_file():
        return {}
    users = users_beside(place)
    return {"users": user_artifact(users)} if users else {}


def evaluation_sets(config: Pipeline) -> dict[str, Artifact]:
    """Return the files of data.decontaminate_against as inputs of the data stage. Raises InputError."""
    return {
        f"against{number}": user_artifact(_evaluation_set(Path(path).expanduser()))
        for number, path in enumerate(config.data.decontaminate_against)
    }


def _evaluation_set(place: Path) -> Path:
    if not place.exists() or not os.access(place, os.R_OK):
        raise InputError(f"data.decontaminate_against: there is no file or folder {place} that can be read")
    return place


def find_corpus(source: StackExchangeDump | HubSource) -> Path:
    """Return the source's file or folder; download it first if it is a hub id. Raises InputError."""
    place = Path(source.path).expanduser()
    if isinstance(source, StackExchangeDump):
        if not place.exists():
            raise InputError(f"source.path: there is no file or folder {place}")
        if not os.access(place, os.R_OK):
            raise InputError(
                f"source.path: {place} cannot be read; name a file whose name ends in {DUMP_ENDINGS}, or a "
                "folder of them"
            )
        find_sites(place, source.site)
        return place
    if not place.exists() and not is_hub_id(source.path):
        raise InputError(f"source.path: there is no file or folder {place}")
    if source.is_part:
        return fetch_tables(source)
    if not place.exists():
        wanted = [source.files] if source.files else WANTED
        unwanted = OTHER_FILES if isinstance(source, HhRlhf) and not source.files else None
        place = download(
            str(place),
            "dataset",
            revision=source.revision,
            wanted=wanted,
            unwanted=unwanted,
            setting="source.path",
        )
    return place
