"""Read a user's configuration of accelerate: whether it is there, and how many processes it starts."""

from pathlib import Path
from typing import Any

import yaml

from tasks.config.machine import Launch
from tasks.system.errors import InputError


def find(stage: str, launch: Launch) -> Path:
    """Return the absolute path of a stage's configuration. Raises InputError if it is not there."""
    path = Path(launch.accelerate_config).expanduser().absolute()
    if not path.is_file():
        raise InputError(
            f"machine.launch.{stage}.accelerate_config: {path} is not there; `accelerate config "
            f"--config_file {path}` writes it"
        )
    return path


def read(stage: str, launch: Launch) -> dict[str, Any]:
    """Return the settings of a stage's configuration. Raises InputError if it is missing or cannot be read.

    Names and values are accelerate's to check.
    """
    path = find(stage, launch)
    name = f"machine.launch.{stage}.accelerate_config: {path}"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f": line {mark.line + 1}, {getattr(error, 'problem', '')}" if mark else ""
        raise InputError(f"{name} is not valid YAML{place}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{name} holds no settings; `accelerate config --config_file {path}` writes them")
    return settings


def processes_per_node(settings: dict[str, Any]) -> int:
    """Return how many processes share a node's cores: accelerate's num_processes are those of all nodes.

    Without a usable number, which accelerate refuses itself or takes as one process, it is 1.
    """
    processes, nodes = (settings.get(name, 1) for name in ("num_processes", "num_machines"))
    if not isinstance(processes, int) or not isinstance(nodes, int) or nodes < 1:
        return 1
    return max(1, processes // nodes)
