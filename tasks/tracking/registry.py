"""Register trained policies as versions of a model in MLflow, and move its aliases.

A version is an MLflow logged model of the pipeline's run. Its only file, model.json, names the artifacts of
the policy, of the model that it starts from and of the reward model by their keys: the files themselves stay
where their stages have uploaded them, and `tasks.tracking.remote_artifacts.locate` fetches them by key. A
version's tags name the keys of all stages of the run, so that `alignflow gc` keeps them.

The alias champion is the version that is in use, challenger one that a person has to decide on.
"""

import json
import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from tasks.artifacts.store import home
from tasks.system.errors import InputError
from tasks.system.locks import acquire
from tasks.tracking.client import Tracker
from tasks.tracking.logged_models import log_model
from tasks.tracking.tracked_run import KEY

CHAMPION, CHALLENGER = "champion", "challenger"
STAGE_KEYS, STAGE_DIGESTS = "stage.keys", "stage.digests"  # JSON: of every stage of the run, by its name
DECISION, DECIDED_BY, DECIDED_AT, NOTE = (f"decision.{name}" for name in ("made", "by", "at", "note"))
PREVIOUS = "previous_champion"  # "" if there was none
SINCE = "champion.since"  # also of a version that is no champion any more; later decisions leave it
ROLLED_BACK_AT, ROLLED_BACK_BY, ROLLED_BACK_TO = (f"rolled_back.{name}" for name in ("at", "by", "to"))
PROMOTED = "promoted"
MAX_TEXT = 4000  # characters of a tag's value or a description; MLflow's databases take 5000


class ModelVersion(NamedTuple):
    """A version of a registered model."""

    name: str
    version: str
    run_id: str  # "" if it was registered without a run
    tags: dict[str, str]
    created: float  # seconds since the epoch
    aliases: tuple[str, ...] = ()


def list_versions(
    tracker: Tracker, name: str = "", patience: float | None = None, *, by_hand: bool = False
) -> list[ModelVersion]:
    """Return the versions of one registered model, or of all that alignflow has registered, newest first.

    With ``by_hand`` also those that a person has registered, which have no tags of ours.
    """
    quote = '"' if "'" in name else "'"
    ours = None if by_hand else f"tags.`{KEY}` != ''"
    condition = f"name={quote}{name}{quote}" if name else ours
    found: list[Any] = []
    token: str | None = None
    while True:
        ask = partial(_search, condition=condition, token=token)
        page = tracker.call(ask, patience)
        found += page
        token = page.token
        if not token:
            break
    aliases = {model: _aliases(tracker, model, patience) for model in {one.name for one in found}}
    versions = [_as_version(one, aliases[one.name]) for one in found]
    return sorted(versions, key=lambda one: (one.name, int(one.version)), reverse=True)


def _search(client: Any, *, condition: str | None, token: str | None) -> Any:
    return client.search_model_versions(filter_string=condition, page_token=token)


def _aliases(tracker: Tracker, name: str, patience: float | None) -> dict[str, str]:
    """Return the version by each alias of a model."""
    model = tracker.call(lambda client: client.get_registered_model(name), patience)
    return {alias: str(version) for alias, version in model.aliases.items()}


def _as_version(found: Any, aliases: dict[str, str]) -> ModelVersion:
    version = str(found.version)
    return ModelVersion(
        name=found.name,
        version=version,
        run_id=found.run_id or "",
        tags=dict(found.tags),
        created=found.creation_timestamp / 1000,
        aliases=tuple(sorted(alias for alias, its in aliases.items() if its == version)),
    )


def find_version(tracker: Tracker, name: str, wanted: str) -> ModelVersion | None:
    """Return the version of a model with this number or alias; None if there is none."""
    versions = list_versions(tracker, name)
    return next((one for one in versions if wanted == one.version or wanted in one.aliases), None)


def find_model(tracker: Tracker, alias: str) -> str:
    """Return the name of the model that has a version with this alias. Raises InputError if it is not one."""
    names = sorted({one.name for one in list_versions(tracker) if alias in one.aliases})
    if not names:
        raise InputError(
            f"No model has a {alias}: `alignflow models` lists all versions, `alignflow promote` makes one"
        )
    if len(names) > 1:
        raise InputError(f"Several models have a {alias}, so name the model: {', '.join(names)}")
    return names[0]


def register(
    tracker: Tracker, name: str, *, run_id: str, policy: str, content: dict[str, Any], tags: dict[str, str]
) -> ModelVersion:
    """Return the version of a policy, which is created unless its key is registered already.

    ``policy`` is the stage that has trained it, ``content`` that of model.json, and ``tags`` are set in both
    cases; KEY, the key of the policy, must be among them.
    """
    with _locked():
        known = (one for one in list_versions(tracker, name) if one.tags.get(KEY) == tags[KEY])
        found = next(known, None)
        if found is None:
            number = _create(tracker, name, run_id=run_id, policy=policy, content=content, key=tags[KEY])
        else:
            number = found.version
        set_tags(tracker, name, number, tags)
    version = find_version(tracker, name, number)
    assert version is not None
    return version


def _locked() -> AbstractContextManager[Any]:
    """Let one process of this home at a time change the registry; MLflow itself has no lock."""
    return acquire(home() / "locks" / "registry.lock")


def _create(
    tracker: Tracker, name: str, *, run_id: str, policy: str, content: dict[str, Any], key: str
) -> str:
    """Create a version, and the model if it is the first; return the version's number."""
    if not any(one.name == name for one in _models(tracker)):
        tracker.call(lambda client: client.create_registered_model(name))
    model_id = log_model(tracker, run_id, policy, kind="policy", content=content, tags={KEY: key})
    source = f"models:/{model_id}"
    created = tracker.call(
        lambda client: client.create_model_version(
            name, source, run_id, tags={KEY: key}, model_id=model_id, await_creation_for=0
        )
    )
    return str(created.version)


def _models(tracker: Tracker) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        ask = partial(_search_models, token=token)
        page = tracker.call(ask)
        found += page
        token = page.token
        if not token:
            return found


def _search_models(client: Any, *, token: str | None) -> Any:
    return client.search_registered_models(page_token=token)


def set_tags(tracker: Tracker, name: str, version: str, tags: dict[str, str]) -> None:
    """Set tags of a version; those that it has already are not sent."""
    known = tracker.call(lambda client: client.get_model_version(name, version)).tags
    for tag, value in tags.items():
        short = value[:MAX_TEXT]
        if known.get(tag) != short:
            tracker.call(partial(_set_tag, name=name, version=version, tag=tag, value=short))


def _set_tag(client: Any, *, name: str, version: str, tag: str, value: str) -> None:
    client.set_model_version_tag(name, version, tag, value)


def describe(tracker: Tracker, version: ModelVersion, text: str) -> None:
    """Set the description of a version, in Markdown."""
    short = text[:MAX_TEXT]
    tracker.call(lambda client: client.update_model_version(version.name, version.version, description=short))


def stage_keys(version: ModelVersion) -> set[str]:
    """Return the keys of all artifacts that a version names. Raises ValueError if a tag was altered."""
    keys = set(json.loads(version.tags.get(STAGE_KEYS, "{}")).values())
    return keys | {version.tags.get(KEY, "")} - {""}


def set_alias(tracker: Tracker, version: ModelVersion, alias: str) -> None:
    """Point an alias of the model to this version."""
    tracker.call(lambda client: client.set_registered_model_alias(version.name, alias, version.version))


def remove_alias(tracker: Tracker, version: ModelVersion, alias: str) -> None:
    """Remove an alias if it points to this version."""
    if _aliases(tracker, version.name, None).get(alias) == version.version:
        tracker.call(lambda client: client.delete_registered_model_alias(version.name, alias))


def decide(tracker: Tracker, version: ModelVersion, decision: str, *, by: str, note: str) -> None:
    """Record a decision in the version's tags, and end its time as challenger."""
    tags = {DECISION: decision, DECIDED_BY: by, DECIDED_AT: timestamp(), NOTE: note}
    set_tags(tracker, version.name, version.version, tags)
    remove_alias(tracker, version, CHALLENGER)


def make_champion(tracker: Tracker, version: ModelVersion, *, expected: str, by: str, note: str) -> None:
    """Make a version the champion in place of ``expected``, the champion's number, "" if there is none.

    The earlier champion is recorded in the version's tags, for the way back; that it was rolled back once is
    not any more. Raises InputError if there is another champion than the one that it was compared with.
    """
    with _locked():
        found = find_version(tracker, version.name, CHAMPION)
        if (found.version if found else "") != expected:
            now = f"version {found.version}" if found else "none any more"
            raise InputError(
                f"The champion of {version.name} has changed meanwhile, it is {now}: promote again, which "
                "compares with that"
            )
        set_tags(tracker, version.name, version.version, {PREVIOUS: expected, SINCE: timestamp()})
        _forget_rollback(tracker, version)
        set_alias(tracker, version, CHAMPION)
        decide(tracker, version, PROMOTED, by=by, note=note)


def _forget_rollback(tracker: Tracker, version: ModelVersion) -> None:
    """Delete the tags of a version that say that it was rolled back."""
    known = tracker.call(lambda client: client.get_model_version(version.name, version.version)).tags
    for tag in (ROLLED_BACK_AT, ROLLED_BACK_BY, ROLLED_BACK_TO):
        if tag in known:
            tracker.call(partial(_delete_tag, name=version.name, version=version.version, tag=tag))


def _delete_tag(client: Any, *, name: str, version: str, tag: str) -> None:
    client.delete_model_version_tag(name, version, tag)


def roll_back(tracker: Tracker, name: str, to: str, *, by: str) -> tuple[ModelVersion, ModelVersion]:
    """Make an earlier champion the champion again; return the version left and the one restored.

    ``to`` is its number; "" is the champion before this one that was not rolled back itself. What is left
    counts as rolled back, unless this undoes the rollback that led to it. Raises InputError.
    """
    with _locked():
        return _roll_back(tracker, name, to, by=by)


def _roll_back(tracker: Tracker, name: str, to: str, *, by: str) -> tuple[ModelVersion, ModelVersion]:
    versions = {one.version: one for one in list_versions(tracker, name)}
    current = next((one for one in versions.values() if CHAMPION in one.aliases), None)
    if current is None:
        raise InputError(f"The model {name} has no champion; `alignflow models` lists its versions")
    wanted = to or _champion_before(versions, current)
    if not wanted:
        first = "is its first champion"
        if current.tags.get(PREVIOUS):
            first = "has only champions before it that were rolled back"
        raise InputError(f"Version {current.version} of {name} {first}: --to names another version")
    target = versions.get(wanted)
    if target is None:
        raise InputError(f"The model {name} has no version {wanted}; `alignflow models` lists its versions")
    if target.version == current.version:
        raise InputError(f"Version {target.version} of {name} is the champion already")
    if SINCE not in target.tags:
        raise InputError(
            f"Version {target.version} of {name} was never the champion, so there is no way back to it; "
            "`alignflow promote` promotes it if it passes the gates"
        )
    if not _was_left_for(versions, target, current):
        left = {ROLLED_BACK_AT: timestamp(), ROLLED_BACK_BY: by, ROLLED_BACK_TO: target.version}
        set_tags(tracker, name, current.version, left)
    set_alias(tracker, target, CHAMPION)
    _forget_rollback(tracker, target)
    return current, target


def _champion_before(versions: dict[str, ModelVersion], current: ModelVersion) -> str:
    """Return the number of the last champion before this one that was not rolled back, or ""."""
    number = current.tags.get(PREVIOUS, "")
    while number in versions and ROLLED_BACK_AT in versions[number].tags:
        number = versions[number].tags.get(PREVIOUS, "")
    return number


def _was_left_for(versions: dict[str, ModelVersion], target: ModelVersion, current: ModelVersion) -> bool:
    """Return whether rollbacks led from ``target`` to ``current``."""
    number, seen = target.tags.get(ROLLED_BACK_TO, ""), set[str]()
    while number in versions and number not in seen and number != current.version:
        seen.add(number)
        number = versions[number].tags.get(ROLLED_BACK_TO, "")
    return number == current.version


def timestamp() -> str:
    """Return the present time as text, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
