"""What the Prefect server is told: work pools, the deployments of deployments/prefect.yaml and of more profiles, automations. Repeatable."""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flows import profiles
from flows.services.processes import ServerFailed
from tasks.artifacts.hub import is_hub_id
from tasks.config.machine import Pools
from tasks.config.models import HuggingFaceBase
from tasks.config.pipeline import Pipeline
from tasks.config.sources import HubSource
from tasks.system.errors import InputError

FOLDERS = (Path(__file__).resolve().parents[2] / "deployments", Path(sys.prefix) / "share" / "alignflow")
POOLS = {"cpu": 4, "gpu": None}  # runs at a time in a pool; a gpu worker itself takes one
PATTERN = "demo"  # the deployments that are repeated for every further profile
STEP = "flows.commands.deploy.profile"
BANNED = "/%&<>"  # in the name of a deployment


class Definition(NamedTuple):
    """What a Prefect server is to be told."""

    content: dict[str, Any]  # of a prefect.yaml
    pools: dict[str, int | None]
    left_out: dict[str, str]  # why, by the name of a deployment that could never run

    @property
    def names(self) -> list[str]:
        return [_name_of(one) for one in self.content["deployments"]]


def define(more: list[str]) -> Definition:
    """Return the built-in deployments, those of more profiles, and what their own pools need. Raises InputError before anything is made."""
    content, folder = _with_profiles(_definition(), more), Path.cwd()
    left_out: dict[str, str] = {}
    pools = dict(POOLS)
    kept, stages = [], {}
    for one in content["deployments"]:
        if "build" not in one:
            stages[one["name"]] = one
            continue
        step = one["build"][0][STEP]
        step["folder"] = str(folder)  # where relative paths begin: the step runs elsewhere
        config = profiles.load(step["name"], step.get("settings", []))
        if lacking := _lacking(profiles.with_absolute_paths(config, folder)):
            if any(profiles.title(name) == one["name"] for name in more):
                raise InputError(f"The profile {one['name']} cannot be deployed: {lacking}")
            left_out[_name_of(one)] = lacking
            continue
        kept.append(one)
        for kind in ("cpu", "gpu"):
            if (pool := getattr(config.pools, kind)) and pool not in pools:
                pools[pool] = POOLS[kind]
                stages[pool] = {**stages_like(content, kind), "name": pool, "work_pool": {"name": pool}}
    return Definition({**content, "deployments": [*kept, *stages.values()]}, pools, left_out)


def stages_like(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a copy of the deployment that runs stages of a kind."""
    found: dict[str, Any] = next(one for one in content["deployments"] if _name_of(one) == f"stage/{kind}")
    return copy.deepcopy(found)


def _lacking(config: Pipeline) -> str:
    """Return what a deployment would look for in vain wherever it ran: a relative path that leads to nothing from here."""
    paths = {f"{stage}.start": getattr(config, stage).start for stage in ("sft", "reward", "dpo")}
    paths |= {f"data.decontaminate_against {path}": path for path in config.data.decontaminate_against}
    for section in (config.source, config.base):
        may_be_hub_id = isinstance(section, HubSource | HuggingFaceBase) and is_hub_id(section.path)
        if path := "" if may_be_hub_id else getattr(section, "path", ""):
            paths["base.path" if section is config.base else "source.path"] = path
    for setting, path in paths.items():
        if path and not Path(path).expanduser().is_absolute():
            return (
                f"{setting}: there is no {path} here, and workers run in other folders; name an absolute path"
            )
    return ""


def profile(name: str, gpu: str = "", settings: list[str] | None = None, folder: str = "") -> dict[str, Any]:
    """A build step of prefect.yaml: the whole settings of a profile as a deployment's parameters, so that its form is filled with them.

    Training and sampling go to the pool ``gpu``, unless the profile has a section ``pools`` of its own. Relative paths begin in ``folder``.
    """
    config = profiles.load(name, settings or [])
    if "pools" not in profiles.read(profiles.find(name)):
        config = config.model_copy(update={"pools": Pools(gpu=gpu)})
    config = profiles.with_absolute_paths(config, Path(folder or Path.cwd()))
    return {"config": config.model_dump(mode="json"), "title": profiles.title(name)}


def deploy(definition: Definition, *, webhook: str = "") -> list[str]:
    """Make or update everything; return the names of the deployments."""
    _make_pools(definition.pools)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "prefect.yaml")
        file.write_text(yaml.safe_dump(definition.content, sort_keys=False))
        command = [
            sys.executable,
            "-m",
            "prefect",
            "--no-prompt",
            "deploy",
            "--all",
            "--prefect-file",
            str(file),
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"The deployments could not be made: {_told(done.stdout + done.stderr)}")
    from flows.services.automations import automate

    automate(webhook)
    return definition.names


def _definition() -> dict[str, Any]:
    file = next(folder / "prefect.yaml" for folder in FOLDERS if (folder / "prefect.yaml").is_file())
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def _with_profiles(content: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """The deployments of PATTERN once more for every further profile; a built-in one that is there already needs no other."""
    patterns = [one for one in content["deployments"] if one["name"] == PATTERN]
    built_in = {one["name"] for one in content["deployments"]}
    added: dict[str, Path] = {}
    for name in more:
        profiles.load(name, [])  # a mistake is told before anything is made
        title, place = profiles.title(name), profiles.find(name).resolve()
        if title in built_in:
            if place.parent in [folder.resolve() for folder in profiles.FOLDERS]:
                continue
            raise InputError(f"There is a built-in deployment {title}; give the profile {name} another name")
        if added.setdefault(title, place) != place:
            raise InputError(
                f"Two profiles are called {title}: {added[title]} and {place}; give one another name"
            )
        if wrong := sorted(set(title) & set(BANNED)):
            raise InputError(
                f"A deployment cannot be called {title}: give the profile a name without {' '.join(wrong)}"
            )
    for title, place in added.items():
        for pattern in copy.deepcopy(patterns):
            pattern["build"][0][STEP]["name"] = str(place)
            for trigger in pattern.get("triggers", []):
                trigger["name"] = trigger["name"].replace(PATTERN, title)
                trigger["match"] = {"prefect.resource.id": f"alignflow.data.{title}"}
            content["deployments"].append({**pattern, "name": title, "description": f"Profile {title}."})
    return content


def _name_of(deployment: dict[str, Any]) -> str:
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def _make_pools(pools: dict[str, int | None]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for name, limit in pools.items():
            try:
                client.read_work_pool(name)  # what its operator has changed stays
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))


def _told(text: str) -> str:
    """What Prefect printed, without its boxes, as one line."""
    return " ".join("".join(" " if letter in "│╭╰─╮╯" else letter for letter in text).split())[:500]
