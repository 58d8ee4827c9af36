"""`alignflow deploy`: create or update work pools, deployments and automations on a Prefect server.

The deployments are those of deployments/prefect.yaml, and of profiles that the user names.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from flows import profiles
from flows.arguments import add_deployed_profiles
from flows.services.processes import ServerFailed
from tasks.artifacts.hub import is_hub_id
from tasks.config.machine import Launches, Pools
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import HuggingFaceBase
from tasks.config.sections.sources import HubSource
from tasks.system.errors import InputError

HELP = "Put deployments, pools and automations on a Prefect server."
EXAMPLE = "alignflow deploy mine.yaml"

FOLDERS = (Path(__file__).resolve().parents[2] / "deployments", Path(sys.prefix) / "share" / "alignflow")
POOLS = {"cpu": 4, "gpu": None}  # most runs at a time in a pool; a gpu worker takes one at a time
PATTERN = "demo"  # its deployments are repeated for every further profile
STEP = "flows.commands.deploy.profile"
BANNED = "/%&<>"  # characters that a deployment's name must not have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow deploy`."""
    add_deployed_profiles(parser)


def main(args: argparse.Namespace) -> None:
    """Deploy, and print the names of the deployments. Raises InputError and ServerFailed."""
    definition = define(args.profile)
    from flows.preflight import require_prefect_server

    require_prefect_server()
    names = deploy(definition, webhook=os.environ.get("ALIGNFLOW_ALERT_WEBHOOK", ""))
    print("\n".join([*names, *(f"left out: {name}: {why}" for name, why in definition.left_out.items())]))


class Definition(NamedTuple):
    """The pools and deployments that a Prefect server gets."""

    content: dict[str, Any]  # of a prefect.yaml
    pools: dict[str, int | None]
    left_out: dict[str, str]  # deployments that could never run: the reason by the name

    @property
    def names(self) -> list[str]:
        """Return the names of the deployments, as FLOW/DEPLOYMENT."""
        return [_full_name(deployment) for deployment in self.content["deployments"]]


def define(more: list[str]) -> Definition:
    """Return the built-in deployments, those of more profiles, and the pools that they need.

    Raises InputError, before anything is created.
    """
    content, folder = _with_profiles(_read_definition(), more), Path.cwd()
    left_out: dict[str, str] = {}
    pools = dict(POOLS)
    flows, stages = [], {}
    titles = [profiles.title(name) for name in more]
    for deployment in content["deployments"]:
        if "build" not in deployment:
            stages[deployment["name"]] = deployment
            continue
        step = deployment["build"][0][STEP]
        step["folder"] = str(folder)  # relative paths start here; the step runs in another folder
        config = profiles.load(step["name"], step.get("settings", []))
        if problem := _find_relative_path(profiles.with_absolute_paths(config, folder)):
            if deployment["name"] in titles:
                raise InputError(f"The profile {deployment['name']} cannot be deployed: {problem}")
            left_out[_full_name(deployment)] = problem
            continue
        flows.append(deployment)
        for kind in ("cpu", "gpu"):
            if (pool := getattr(config.pools, kind)) and pool not in pools:
                pools[pool] = POOLS[kind]
                stages[pool] = {
                    **copy_stage_deployment(content, kind), "name": pool, "work_pool": {"name": pool},
                }  # fmt: skip
    return Definition({**content, "deployments": [*flows, *stages.values()]}, pools, left_out)


def copy_stage_deployment(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a copy of the deployment that runs the stages of a kind (cpu or gpu)."""
    found: dict[str, Any] = next(
        deployment for deployment in content["deployments"] if _full_name(deployment) == f"stage/{kind}"
    )
    return copy.deepcopy(found)


def _find_relative_path(config: Pipeline) -> str:
    """Return a sentence about a relative path that does not exist here, "" if there is none.

    Paths that exist have been made absolute; a worker could not find the others.
    """
    paths = {f"{stage}.start": getattr(config, stage).start for stage in ("sft", "reward", "dpo", "ppo")}
    paths |= {f"data.decontaminate_against {path}": path for path in config.data.decontaminate_against}
    paths |= {f"benchmarks.files {path}": path for path in config.benchmarks.files}
    paths |= {"benchmarks.reward_bench": config.benchmarks.reward_bench, "ppo.ptx.path": config.ppo.ptx.path}
    for stage in Launches.model_fields:
        paths[f"machine.launch.{stage}.accelerate_config"] = config.machine.of(stage).accelerate_config
    for model in config.ppo.rewards.models:
        paths |= {f"ppo.rewards.models {model.name}": model.path, f"base of {model.name}": model.base}
    for section in (config.source, config.base):
        may_be_hub_id = isinstance(section, HubSource | HuggingFaceBase) and is_hub_id(section.path)
        if path := "" if may_be_hub_id else getattr(section, "path", ""):
            paths["base.path" if section is config.base else "source.path"] = path
    if config.rounds.labels.kind == "file":
        paths["rounds.labels.path"] = config.rounds.labels.path
    for setting, path in paths.items():
        if path and not Path(path).expanduser().is_absolute():
            return (
                f"{setting}: there is no {path} here, and workers run in other folders; name an absolute path"
            )
    return ""


def profile(name: str, gpu: str = "", settings: list[str] | None = None, folder: str = "") -> dict[str, Any]:
    """Return all settings of a profile as a deployment's parameters, which fill Prefect's form.

    This is a build step of prefect.yaml. Stages that train or sample go to the pool ``gpu``, unless the
    profile has a section ``pools``. Relative paths start in ``folder``.
    """
    config = profiles.load(name, settings or [])
    if "pools" not in profiles.read(profiles.find(name)):
        config = config.model_copy(update={"pools": Pools(gpu=gpu)})
    config = profiles.with_absolute_paths(config, Path(folder or Path.cwd()))
    filled = config.model_dump(mode="json")
    return {
        "config": filled,
        "promotion": filled["promotion"],
        "title": profiles.title(name),
    }


def deploy(definition: Definition, *, webhook: str = "") -> list[str]:
    """Create or update pools, deployments and automations; return the deployments. Raises ServerFailed."""
    _create_pools(definition.pools)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "prefect.yaml")
        file.write_text(yaml.safe_dump(definition.content, sort_keys=False))
        options = ["--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        command = [sys.executable, "-m", "prefect", *options]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        output = _on_one_line(done.stdout + done.stderr)
        raise ServerFailed(f"The deployments could not be made: {output}")
    from flows.services.automations import create_automations

    create_automations(webhook)
    return definition.names


def _read_definition() -> dict[str, Any]:
    file = next(folder / "prefect.yaml" for folder in FOLDERS if (folder / "prefect.yaml").is_file())
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def _with_profiles(content: dict[str, Any], more: list[str]) -> dict[str, Any]:
    """Add a copy of PATTERN's deployments for every further profile that is not deployed already."""
    patterns = [deployment for deployment in content["deployments"] if deployment["name"] == PATTERN]
    for title, path in _find_profiles(more, {one["name"] for one in content["deployments"]}).items():
        for pattern in copy.deepcopy(patterns):
            pattern["build"][0][STEP]["name"] = str(path)
            for trigger in pattern.get("triggers", []):
                trigger["name"] = trigger["name"].replace(PATTERN, title)
                trigger["match"] = {"prefect.resource.id": f"alignflow.data.{title}"}
            content["deployments"].append({**pattern, "name": title, "description": f"Profile {title}."})
    return content


def _find_profiles(more: list[str], built_in: set[str]) -> dict[str, Path]:
    """Return the file of every further profile by its title. Raises InputError if a title cannot be used."""
    files: dict[str, Path] = {}
    for name in more:
        profiles.load(name, [])  # refuses bad settings before anything is created
        title, path = profiles.title(name), profiles.find(name).resolve()
        if title in built_in:
            if path.parent in [folder.resolve() for folder in profiles.FOLDERS]:
                continue
            raise InputError(f"There is a built-in deployment {title}; give the profile {name} another name")
        if files.setdefault(title, path) != path:
            raise InputError(
                f"Two profiles are called {title}: {files[title]} and {path}; give one another name"
            )
        if banned := sorted(set(title) & set(BANNED)):
            raise InputError(
                f"A deployment cannot be called {title}: give the profile a name without {' '.join(banned)}"
            )
    return files


def _full_name(deployment: dict[str, Any]) -> str:
    """Return FLOW/DEPLOYMENT, as Prefect's command line calls it."""
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def _create_pools(pools: dict[str, int | None]) -> None:
    """Create the pools that are missing; one that exists keeps what its operator has changed."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        for name, limit in pools.items():
            try:
                client.read_work_pool(name)
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))


def _on_one_line(text: str) -> str:
    """Return what Prefect printed as one line, without the boxes that it draws."""
    return " ".join("".join(" " if letter in "│╭╰─╮╯" else letter for letter in text).split())[:500]
