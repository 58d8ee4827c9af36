"""Find the champion's files, so that a run can let it answer the same questions as the new policies."""

import json

from tasks.artifacts.artifact import Artifact, stage_artifact
from tasks.artifacts.store import home
from tasks.config.sections.gates import Promotion
from tasks.promotion.finished_runs import find_manifest
from tasks.system import events
from tasks.tracking import registry
from tasks.tracking.client import PATIENCE_TO_CONNECT, Tracker
from tasks.tracking.registry import ModelVersion

MODEL = "_model"  # ending of the name of the merged model that a policy was trained from


def find_opponents(tracker: Tracker, promotion: Promotion) -> dict[str, Artifact]:
    """Return the champion as inputs of the stage answers: "champion" and "champion_model".

    "previous" and "previous_model" are the champion before it: a run whose own policy has become the champion
    was compared with that one. Empty if there is no champion, if its gate is off or if MLflow is unreachable.
    """
    is_new = not tracker.is_remote and not (home() / "mlflow.db").exists()
    if promotion.gates.win_rate_vs_champion is None or is_new or not tracker.connect():
        return {}
    found: dict[str, Artifact] = {}
    with tracker.turned_off_by_errors():
        versions = registry.list_versions(tracker, promotion.model, PATIENCE_TO_CONNECT)
        champion = next((one for one in versions if registry.CHAMPION in one.aliases), None)
        earlier = champion.tags.get(registry.PREVIOUS, "") if champion else ""
        previous = next((one for one in versions if one.version == earlier), None)
        for name, version in (("champion", champion), ("previous", previous)):
            if version:
                found |= _artifacts(tracker, name, version)
    return found


def _artifacts(tracker: Tracker, name: str, version: ModelVersion) -> dict[str, Artifact]:
    """Return a version's policy and its merged model; none if a file of them is nowhere, with a warning."""
    keys = json.loads(version.tags.get(registry.STAGE_KEYS, "{}"))
    found: dict[str, Artifact] = {}
    for ending, stage in (("", version.tags.get("policy", "")), (MODEL, "merge")):
        manifest = find_manifest(tracker, stage, keys[stage]) if stage in keys else None
        if manifest is None:
            text = f"Version {version.version} of {version.name} is compared with nothing: its files are gone"
            events.tell("warning", text=text)
            return {}
        artifact = stage_artifact(manifest, {}, cached=True, seconds=0.0)
        artifact["job"] = manifest["job"]
        found[f"{name}{ending}"] = artifact
    return found
