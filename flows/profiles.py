"""Read profiles: the part of ``Pipeline`` that a YAML file sets, and what --set changes in it.

Every mistake is an InputError with one sentence.
"""

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flows.setting_values import convert_settings, read_argument, read_yaml
from tasks.artifacts.store import flatten
from tasks.config.judge_prompts import is_own_prompt
from tasks.config.machine import Launch, Launches
from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import replace_old_names
from tasks.config.sections.rewards import OtherRewardModel
from tasks.system.errors import InputError

FOLDERS = (
    Path(__file__).resolve().parents[1] / "deployments" / "profiles",
    Path(sys.prefix) / "share" / "alignflow" / "profiles",
)


def load(profile: str, settings: list[str]) -> Pipeline:
    """Return the settings of a profile, with changes such as 'ppo.steps=10'. Raises InputError."""
    return _with_changes(_over(_defaults(), read(find(profile))), settings)


def change(section: str, known: dict[str, Any], settings: list[str]) -> Pipeline:
    """Return the defaults with one section of an earlier run, and with changes. Raises InputError."""
    return over_defaults({section: known}, settings)


def over_defaults(known: dict[str, Any], settings: list[str]) -> Pipeline:
    """Return the defaults with some settings by section, and with changes. Raises InputError."""
    return _with_changes(_over(_defaults(), known), settings)


def _with_changes(known: dict[str, Any], settings: list[str]) -> Pipeline:
    changed: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--set takes NAME=VALUE, such as --set ppo.kl_coefficient=0.1, not {setting!r}")
        changed = _over(changed, _nested(name.strip(), _value(name.strip(), text)))
    try:
        return Pipeline.model_validate(_over(known, _under_current_names(changed)))
    except ValidationError as error:
        raise InputError(format_error(error)) from None


def names() -> list[str]:
    """Return the names of the built-in profiles."""
    return sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})


def find(profile: str) -> Path:
    """Return the file of a profile. Raises InputError, which proposes the nearest name."""
    looks_like_file = profile.endswith((".yaml", ".yml")) or "/" in profile
    candidates = [Path(profile)] if looks_like_file else [folder / f"{profile}.yaml" for folder in FOLDERS]
    found = next((path for path in candidates if path.is_file()), None)
    if found:
        return found
    if looks_like_file:
        raise InputError(f"There is no profile file {profile}")
    raise InputError(f"There is no profile {profile!r}{hint(profile, names())}")


def read(path: Path) -> dict[str, Any]:
    """Return the settings in a profile's file. Raises InputError."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(
            f"{path} is not valid YAML"
            + (f": line {mark.line + 1}, {getattr(error, 'problem', '')}" if mark else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict | None):
        raise InputError(
            f"{path} must hold settings such as 'ppo: {{steps: 10}}', not a {type(content).__name__}"
        )
    return convert_settings(_under_current_names(content or {}))


def title(profile: str) -> str:
    """Return the name of a profile's deployments and runs: its own, or its file's name without the ending."""
    path = Path(profile)
    return path.stem if path.suffix in (".yaml", ".yml") else path.name


def with_absolute_paths(config: Pipeline, folder: Path) -> Pipeline:
    """Return the settings with absolute paths for all that exists relative to ``folder``.

    Programs and workers run in other folders.
    """

    def make_absolute(text: str) -> str:
        place = folder / Path(text).expanduser()
        return os.path.normpath(place) if text and place.exists() else text

    def of_reward_model(model: OtherRewardModel) -> OtherRewardModel:
        return model.model_copy(update={"path": make_absolute(model.path), "base": make_absolute(model.base)})

    def of_launch(launch: Launch) -> Launch:
        return launch.model_copy(update={"accelerate_config": make_absolute(launch.accelerate_config)})

    launches = {stage: of_launch(config.machine.of(stage)) for stage in Launches.model_fields}
    changed: dict[str, Any] = {
        "machine": config.machine.model_copy(
            update={"launch": config.machine.launch.model_copy(update=launches)}
        ),
        "data": config.data.model_copy(
            update={"decontaminate_against": tuple(map(make_absolute, config.data.decontaminate_against))}
        ),
        "benchmarks": config.benchmarks.model_copy(
            update={
                "files": tuple(map(make_absolute, config.benchmarks.files)),
                "reward_bench": make_absolute(config.benchmarks.reward_bench),
            }
        ),
        "ppo": config.ppo.model_copy(
            update={
                "ptx": config.ppo.ptx.model_copy(update={"path": make_absolute(config.ppo.ptx.path)}),
                "rewards": config.ppo.rewards.model_copy(
                    update={"models": tuple(map(of_reward_model, config.ppo.rewards.models))}
                ),
            }
        ),
    }
    labels = config.rounds.labels
    if labels.kind == "file":
        placed = labels.model_copy(update={"path": make_absolute(labels.path)})
        changed["rounds"] = config.rounds.model_copy(update={"labels": placed})
    for section, name in (
        ("source", "path"),
        ("base", "path"),
        ("judge", "path"),
        ("judge", "prompt"),
        *((stage, "start") for stage in ("sft", "reward", "dpo", "ppo")),
    ):
        settings = getattr(config, section)
        if hasattr(settings, name) and not is_own_prompt(getattr(settings, name)):
            known = changed.get(section, settings)
            changed[section] = known.model_copy(update={name: make_absolute(getattr(settings, name))})
    return config.model_copy(update=changed)


def _under_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one profile or command line with old names replaced. Raises InputError."""
    try:
        renamed: dict[str, Any] = replace_old_names([Pipeline], settings)
    except ValueError as error:
        raise InputError(str(error)) from None
    return renamed


def _defaults() -> dict[str, Any]:
    return Pipeline().model_dump(mode="json")


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return ``below`` with the values of ``above``, section by section.

    A section of another kind replaces the one below, so that it starts from the defaults of its own kind.
    """
    result = dict(below)
    for name, value in above.items():
        under = result.get(name)
        if isinstance(under, dict) and value is None:
            continue  # a section's name with nothing below it in YAML
        kind = under.get("kind") if isinstance(under, dict) else None
        if (
            isinstance(under, dict)
            and isinstance(value, dict)
            and (kind is None or value.get("kind", kind) == kind)
        ):
            result[name] = _over(under, value)
        else:
            result[name] = value
    return result


def _nested(name: str, value: Any) -> dict[str, Any]:
    """Return {a: {b: value}} for the name a.b."""
    first, _, rest = name.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _value(name: str, text: str) -> Any:
    """Return the value of ``--set name=text``. Raises InputError."""
    try:
        return read_argument(name, text)
    except yaml.YAMLError:
        raise InputError(
            f"--set {name}: {text!r} is not a value; it takes YAML, as in [a, 'b c'] or {{name: value}}"
        ) from None


def format_error(error: ValidationError) -> str:
    """Return a sentence about the first error, which names the setting as --set does."""
    errors = error.errors()
    # a misspelt name is also reported as a missing one; the misspelling is the cause
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    section, name = _walk(first["loc"])
    message, got = first["msg"].replace("Input should be", "must be"), first["input"]
    message = message.replace("a valid tuple", "a list, such as [a, b]")
    match first["type"]:
        case "extra_forbidden":
            prefix = name.rpartition(".")[0]
            beside = (
                [f"{prefix}.{field}" if prefix else field for field in section.model_fields]
                if section
                else []
            )
            return f"There is no setting {name}{hint(name, beside, flatten(_defaults()))}"
        case "value_error":
            return f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
        case "union_tag_invalid":
            kinds = first["ctx"]["expected_tags"].replace(", ", " or ")
            return f"{name}.kind must be {kinds}, got {first['ctx']['tag']!r}"
        case "missing":
            return f"{name} is missing"
        case "model_type" | "model_attributes_type":
            return f"{name} is a section with settings of its own, not a value; got {_shown(got)}"
    return f"{name} {message}" + (
        "" if ", got" in message or isinstance(got, dict | list) else f", got {_shown(got)}"
    )


def _shown(value: Any) -> str:
    """Return a value as YAML and Python users would write it."""
    return "null" if value is None else repr(value)


def _walk(location: tuple[int | str, ...]) -> tuple[type[BaseModel] | None, str]:
    """Return the section that holds the last name of an error's location, and the location as a dotted name.

    The tags of unions, which pydantic adds to the location, are left out.
    """
    section: Any = Pipeline
    names: list[str] = []
    for part in location:
        tagged = _members(section).get(str(part)) if not _is_model(section) else None
        if tagged:
            section = tagged
            continue
        if isinstance(part, str) and not part.isidentifier():
            continue  # a member of a union that is not a section, such as literal['all-linear']
        names.append(str(part))
        holder = section
        field = section.model_fields.get(part) if _is_model(section) else None
        section = field.annotation if field else None
        last = holder
    return (last if names and _is_model(last) else None), ".".join(names)


def _members(union: Any) -> dict[str, Any]:
    """Return the sections of a union by their kind."""
    models = [member for member in getattr(union, "__args__", ()) if _is_model(member)]
    return {member.model_fields["kind"].default: member for member in models if "kind" in member.model_fields}


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def hint(name: str, known: Iterable[str], more: Iterable[str] = ()) -> str:
    """Return a hint for a wrong name: the nearest of ``known``, else of ``more``, else all of ``known``."""
    endings = {one.rpartition(".")[2]: one for one in known}
    near = [
        endings[found]
        for found in difflib.get_close_matches(name.rpartition(".")[2], endings, n=1, cutoff=0.6)
    ]
    near = near or difflib.get_close_matches(name, list(more), n=1, cutoff=0.75)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are: {', '.join(endings.values())}" if endings else ""
