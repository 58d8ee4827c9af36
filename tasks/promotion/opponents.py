"""Find the champion's files, so that a run can let it answer the same questions as the new policies."""

import json
from collections.abc import Mapping

from tasks.artifacts.artifact import Artifact, stage_artifact, within
from tasks.artifacts.store import home
from tasks.artifacts.weight_files import only_weights
from tasks.config.sections.gates import Promotion
from tasks.promotion.finished_runs import find_manifest
from tasks.system import events
from tasks.system.errors import InputError, InputMissing
from tasks.tracking import registry
from tasks.tracking.client import PATIENCE_TO_CONNECT, Tracker
from tasks.tracking.registry import ModelVersion
from tasks.tracking.remote_artifacts import locate
from tasks.tracking.runs import PROFILE

MODEL = "_model"  # ending of the name of the merged model that a policy was trained from


def find_opponents(
    tracker: Tracker, promotion: Promotion, profile: str, *, fetch: bool = True
) -> dict[str, Artifact]:
    """Return the champion as inputs of the stage answers: "champion" and "champion_model".

    "previous" and "previous_model" are the champion before it: a run whose own policy has become the champion
    was compared with that one. Empty if there is no champion, if its gate is off, if MLflow is unreachable
    or, with a warning, if they cannot be had: a run does not fail for want of an earlier model. ``fetch``
    brings their files to this machine, which shows whether they are intact.
    """
    is_new = not tracker.is_remote and not (home() / "mlflow.db").exists()
    if promotion.gates.win_rate_vs_champion is None or is_new or not tracker.connect():
        return {}
    model = promotion.model_name(profile)
    try:
        return _find(tracker, model, profile, fetch=fetch)
    except Exception as error:  # as of a server without a registry, or of tags that a person has changed
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        _warn(f"The run is compared with no champion: {model} cannot be read from MLflow ({reason})")
        return {}


def write_pin(opponents: Mapping[str, Artifact]) -> str:
    """Return opponents as the text of a tag, from which ``read_pin`` finds them again."""
    return json.dumps({name: [found["stage"], found["key"]] for name, found in opponents.items()})


def read_pin(tracker: Tracker, text: str) -> dict[str, Artifact]:
    """Return the opponents that ``write_pin`` has named, whoever is the champion by now.

    Raises InputError if one cannot be had: with another opponent the run would build other artifacts.
    """
    found: dict[str, Artifact] = {}
    for name, (stage, key) in json.loads(text).items():
        artifact = _artifact(tracker, stage, {stage: key})
        if artifact is None:
            raise InputError(
                f"Before it was stopped, the run was compared with the {name.replace('_', ' ')} {key[:12]}, "
                "whose files are gone: start a new run"
            )
        found[name] = artifact
    return found


def _find(tracker: Tracker, model: str, profile: str, *, fetch: bool) -> dict[str, Artifact]:
    versions = registry.list_versions(tracker, model, PATIENCE_TO_CONNECT)
    champion = next((one for one in versions if registry.CHAMPION in one.aliases), None)
    if champion is None:
        return {}
    if (theirs := champion.tags.get(PROFILE, profile)) != profile:
        _warn(f"The champion of {model}, version {champion.version}, is of the profile {theirs}")
    earlier = champion.tags.get(registry.PREVIOUS, "")
    previous = next((one for one in versions if one.version == earlier), None)
    found: dict[str, Artifact] = {}
    for name, version in (("champion", champion), ("previous", previous)):
        if version:
            found |= _artifacts(tracker, name, version, fetch=fetch)
    return found


def _artifacts(tracker: Tracker, name: str, version: ModelVersion, *, fetch: bool) -> dict[str, Artifact]:
    """Return a version's policy and its merged model; none, with a warning, if a file is gone or damaged."""
    keys = json.loads(version.tags.get(registry.STAGE_KEYS, "{}"))
    policy, model = (_artifact(tracker, stage, keys) for stage in (version.tags.get("policy", ""), "merge"))
    if policy and model and (not fetch or _have_files(tracker, policy, model)):
        return {name: policy, f"{name}{MODEL}": model}
    _warn(f"Version {version.version} of {version.name} is compared with nothing: its files are gone")
    return {}


def _artifact(tracker: Tracker, stage: str, keys: dict[str, str]) -> Artifact | None:
    manifest = find_manifest(tracker, stage, keys[stage]) if stage in keys else None
    if manifest is None:
        return None
    return {**stage_artifact(manifest, {}, cached=True, seconds=0.0), "job": manifest["job"]}


def _have_files(tracker: Tracker, policy: Artifact, model: Artifact) -> bool:
    """Fetch the files that the stage answers reads; return whether all are intact on this machine."""
    try:
        for artifact in (only_weights(policy), within(model, "model")):
            locate(artifact, tracker)
    except InputMissing:
        return False
    return True


def _warn(text: str) -> None:
    events.tell("warning", text=text)
