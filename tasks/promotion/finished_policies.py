"""Find a finished policy by its name, and have its files on this machine.

ppo, dpo, sft, base           a policy of the newest finished run, or of the last round that won
RUN:ppo                       a policy of the run with this id or name
champion, challenger          the registered version with this alias
MODEL@ALIAS, MODEL/VERSION    a registered version
FOLDER                        a model in Hugging Face format
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.artifact import Artifact, content_digest, only, stage_artifact, within
from tasks.artifacts.base_model import base_artifact, check_model_folder
from tasks.config.commands.usage import PolicyFiles
from tasks.config.policies import POLICIES, TRAINED
from tasks.config.sections.models import HuggingFaceBase, Text
from tasks.config.sections.winrate import Winrate
from tasks.promotion.finished_runs import FinishedRun, find_manifest
from tasks.system.errors import InputError
from tasks.system.hashing import digest_of
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import locate

ADAPTER = "adapter"
WEIGHTS = (ADAPTER, "bottleneck", "model")  # folders of a policy's artifact, of which it has one
CARDS, CARD = "model-cards", "README.md"  # among the files of a run in MLflow
NAMES = (
    f"a policy of the newest run, or of the last round that won ({', '.join(POLICIES)}), RUN:POLICY, "
    "champion, MODEL@ALIAS, MODEL/VERSION or a model folder"
)
Connect = Callable[[], Tracker]
FindRun = Callable[[Tracker, str], FinishedRun]  # by name; "" is the newest, or of rounds the best


class Source(NamedTuple):
    """A policy of a finished run: the keys and digests of the run's artifacts by stage."""

    name: str
    about: str
    policy: str
    stages: dict[str, tuple[str, str]]
    run_id: str  # in MLflow; "" if it is not known
    settings: dict[str, Any]  # of the run; empty for a registered version whose run is gone


def find_sources(names: Sequence[str], connect: Connect, find_run: FindRun) -> list[Source | Path]:
    """Return what each name means: a policy of a run, or a model folder. Raises InputError.

    ``connect`` connects to MLflow and ``find_run`` finds a run there; they are called if a name needs that.
    """
    folders = {name: folder for name in names if (folder := _find_folder(name))}  # before the process leaves
    return [folders.get(name) or _find(name, connect, find_run) for name in names]


def _find_folder(name: str) -> Path | None:
    place = Path(os.path.abspath(Path(name).expanduser()))
    if name in POLICIES or not place.is_dir():
        return None
    check_model_folder(place, setting="MODEL")
    return place


def _find(name: str, connect: Connect, find_run: FindRun) -> Source:
    run_name, _, policy = name.rpartition(":")
    if policy in POLICIES:
        return of_run(find_run(connect(), run_name), policy, name)
    for sign in "@/":
        model, _, wanted = name.partition(sign)
        if model and wanted:
            return _of_version(connect(), model, wanted, name)
    if name in (registry.CHAMPION, registry.CHALLENGER):
        tracker = connect()
        return _of_version(tracker, registry.find_model(tracker, name), name, name)
    raise InputError(f"There is no model {name!r}: name {NAMES}")


def trained_names(run: FinishedRun) -> list[str]:
    """Return the names of all policies that a run has trained."""
    return [name for name in POLICIES if name in run.stages or name == "sft"]


def of_run(run: FinishedRun, policy: str, name: str = "") -> Source:
    """Return a policy of a run. Raises InputError."""
    stages = {stage: (about["key"], about["digest"]) for stage, about in run.stages.items()}
    trained = [one for one in POLICIES if one not in TRAINED or one in stages]
    if policy not in trained:
        raise InputError(f"The run has trained no {policy}; it has {', '.join(trained)}")
    title = run.tags.get("mlflow.runName", run.run_id)
    return Source(name or policy, f"{policy} of the run {title}", policy, stages, run.run_id, run.settings)


def _of_version(tracker: Tracker, model: str, wanted: str, name: str) -> Source:
    version = registry.find_version(tracker, model, wanted)
    if version is None:
        raise InputError(f"There is no model version {model} {wanted}; `alignflow models` lists them")
    keys, digests = (
        json.loads(version.tags.get(tag, "{}")) for tag in (registry.STAGE_KEYS, registry.STAGE_DIGESTS)
    )
    policy = version.tags.get("policy", "")
    if policy not in keys:
        raise InputError(
            f"Version {version.version} of {model} does not name its artifacts: promote it again"
        )
    about = f"{policy}, {model} version {version.version}"
    stages = {stage: (key, digests.get(stage, "")) for stage, key in keys.items()}
    return Source(name, about, policy, stages, version.run_id, {})


def policy_files(tracker: Tracker, source: Source) -> PolicyFiles:
    """Return the policy with its files on this machine, fetched if need be. Raises InputError."""
    stage = {"base": "sft", "sft": "merge"}.get(source.policy, source.policy)
    own = _artifact(tracker, source, stage)
    settings = _job(tracker, source, "answers")
    text = Text.model_validate(_job(tracker, source, stage)["text"])
    precision = (settings.get("weights") or {}).get("base" if source.policy == "base" else "merged")
    folder, tuned = None, None
    if source.policy == "base":
        folder = _base(tracker, source)
    elif source.policy == "sft":
        folder = within(own, "model")
    elif _holds(own, "model"):  # all weights were trained, and are stored as they are
        folder, precision = within(own, "model"), None
    else:
        folder = within(_artifact(tracker, source, "merge"), "model")
        tuned = only(own, next(name for name in WEIGHTS if _holds(own, name)))
    return PolicyFiles(
        name=source.name,
        about=source.about,
        folder=str(locate(folder, tracker)),
        tuned=str(locate(tuned, tracker)) if tuned else "",
        precision=precision,
        template=text.template,
        temperature=settings.get("winrate", {}).get("temperature", Winrate().temperature),
        max_answer_tokens=text.max_answer_tokens,
    )


def adapter_files(tracker: Tracker, source: Source) -> tuple[Path, str]:
    """Return the artifact that holds the policy's adapter, and the name or path of the adapter's base.

    Raises InputError.
    """
    stage = source.policy
    if stage == "base" or not _holds(artifact := _artifact(tracker, source, stage), ADAPTER):
        raise InputError(
            f"{source.name} is no adapter in PEFT's format: its weights are exported with --as merged"
        )
    place = locate(only(artifact, ADAPTER), tracker)
    if stage == "sft" and (given := source.settings.get("base", {}).get("path")):
        return place, str(given)
    base = _base(tracker, source) if stage == "sft" else within(_artifact(tracker, source, "merge"), "model")
    return place, str(locate(base, tracker))


def folder_files(folder: Path) -> PolicyFiles:
    """Return a model folder as a policy, with the sampling that its generation_config.json names."""
    try:
        settings = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        settings = {}
    named = {"temperature": settings.get("temperature"), "max_answer_tokens": settings.get("max_new_tokens")}
    known = {key: value for key, value in named.items() if isinstance(value, int | float)}
    return PolicyFiles(name=folder.name, about=str(folder), folder=str(folder), **known)


def content_of(source: Source | Path) -> str:
    """Return a digest of everything that the policy's answers depend on."""
    if isinstance(source, Path):
        return content_digest(source)
    names = {"base": ("sft", "pretrain"), "sft": ("merge",)}.get(source.policy, ("merge", source.policy))
    digests = {name: source.stages[name][1] for name in (*names, "answers") if name in source.stages}
    return digest_of({"policy": source.policy, **digests})


def fetch_card(tracker: Tracker, source: Source, folder: Path) -> Path | None:
    """Fetch the policy's model card of the source's run into ``folder``; None if the run has none."""
    return (
        tracker.download(source.run_id, f"{CARDS}/{source.policy}/{CARD}", folder) if source.run_id else None
    )


def find_data(tracker: Tracker, source: Source) -> Artifact:
    """Return the artifact of the data stage that the policy has learnt from. Raises InputError."""
    return _artifact(tracker, source, "data")


def text_settings(tracker: Tracker, source: Source) -> Text:
    """Return how the source's run has encoded texts."""
    return Text.model_validate(_job(tracker, source, "sft")["text"])


def _artifact(tracker: Tracker, source: Source, stage: str) -> Artifact:
    if stage not in source.stages:
        raise InputError(f"The run of {source.name} has no stage {stage}")
    key, digest = source.stages[stage]
    manifest = find_manifest(tracker, stage, key)
    if manifest is None or manifest["digest"] != digest:
        raise InputError(
            f"{source.name}: the artifact {stage} {key[:12]} is neither on this machine nor in MLflow; "
            "`alignflow run` builds it again"
        )
    return stage_artifact(manifest, {}, cached=True, seconds=0)


def _job(tracker: Tracker, source: Source, stage: str) -> dict[str, Any]:
    """Return the settings that a stage was run with; none if it was not run or is gone."""
    manifest = find_manifest(tracker, stage, source.stages[stage][0]) if stage in source.stages else None
    return manifest["job"] if manifest else {}


def _base(tracker: Tracker, source: Source) -> Artifact:
    """Return the base model: what the stage pretrain has built, or what the user has brought."""
    if "pretrain" in source.stages:
        return within(_artifact(tracker, source, "pretrain"), "model")
    manifest = find_manifest(tracker, "sft", source.stages["sft"][0])
    settings = source.settings.get("base", {})
    if manifest is None or not settings.get("path"):
        raise InputError(f"{source.name}: the settings of its run, which name the base, are gone from MLflow")
    given = base_artifact(HuggingFaceBase.model_validate(settings))
    if given["digest"] != manifest["origins"]["base"]:
        raise InputError(f"{source.name}: the base {settings['path']} is no longer what the run was given")
    return given


def _holds(artifact: Artifact, folder: str) -> bool:
    return any(path.startswith(f"{folder}/") for path in artifact["files"])
