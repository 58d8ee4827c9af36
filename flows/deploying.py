"""What the Prefect server is told: work pools, the deployments of deployments/prefect.yaml and of more profiles, automations. Repeatable."""

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from flows import profiles
from flows.servers import ServerFailed
from tasks.programs.config import InputError, Pools

FOLDERS = (Path(__file__).resolve().parents[1] / "deployments", Path(sys.prefix) / "share" / "alignflow")
POOLS = {"cpu": 4, "gpu": None}  # runs at a time in a pool; a gpu worker itself takes one
PATTERN = "demo"  # the deployments that are repeated for every further profile


def profile(name: str, gpu: str = "", settings: list[str] | None = None) -> dict[str, Any]:
    """A build step of prefect.yaml: the whole settings of a profile as a deployment's parameters, so that its form is filled with them.

    Training and sampling go to the pool ``gpu``, unless the profile has a section ``pools`` of its own.
    """
    config = profiles.load(name, settings or [])
    if "pools" not in profiles.read(profiles.find(name)):
        config = config.model_copy(update={"pools": Pools(gpu=gpu)})
    return {"config": _absolute(config.model_dump(mode="json")), "title": Path(name).stem}


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    """Workers run in other folders: paths that lie here are written out."""
    for section in ("source", "base"):
        path = config[section].get("path")
        if path and Path(path).expanduser().exists():
            config[section]["path"] = str(Path(path).expanduser().resolve())
    return config


def deploy(more: list[str], *, webhook: str = "") -> list[str]:
    """Make or update everything; gives the names of the deployments. ``more`` are profiles beside the built-in ones."""
    content = _with_profiles(_definition(), more)
    _make_pools()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "prefect.yaml")
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerFailed(f"The deployments could not be made: {_told(done.stdout + done.stderr)}")
    from flows.automations import automate

    automate(webhook)
    return [f"{_flow_of(one)}/{one['name']}" for one in content["deployments"]]


def _definition() -> dict[str, Any]:
    file = next(folder / "prefect.yaml" for folder in FOLDERS if (folder / "prefect.yaml").is_file())
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def _with_profiles(content: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """The deployments of PATTERN once more for every further profile."""
    patterns = [one for one in content["deployments"] if one["name"] == PATTERN]
    for name in more:
        profiles.load(name, [])  # a mistake is told before anything is made
        title = Path(name).stem
        if any(one["name"] == title for one in content["deployments"]):
            raise InputError(f"There is a built-in deployment {title}; give the profile {name} another name")
        place = str(Path(name).resolve()) if Path(name).suffix else name
        for pattern in copy.deepcopy(patterns):
            pattern["build"][0]["flows.deploying.profile"]["name"] = place
            for trigger in pattern.get("triggers", []):
                trigger["name"] = trigger["name"].replace(PATTERN, title)
                trigger["match"] = {"prefect.resource.id": f"alignflow.data.{title}"}
            content["deployments"].append({**pattern, "name": title, "description": f"Profile {title}."})
    return content


def _flow_of(deployment: dict[str, Any]) -> str:
    return str(deployment["entrypoint"]).rpartition(".")[2]


def _make_pools() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for name, limit in POOLS.items():
            try:
                client.read_work_pool(name)  # what its operator has changed stays
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))


def _told(text: str) -> str:
    """What Prefect printed, without its boxes, as one line."""
    return " ".join("".join(" " if letter in "│╭╰─╮╯" else letter for letter in text).split())[:500]
