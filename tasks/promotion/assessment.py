"""Assess the best policy of a run by the gates, from its summary and what is registered."""

import json
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.config.policies import TITLES, TRAINED
from tasks.config.sections.gates import Promotion
from tasks.promotion.finished_runs import find_manifest
from tasks.promotion.gate_results import Champion, Choice, Evidence, GateResult
from tasks.promotion.gates import choose, evaluate, failures
from tasks.promotion.person_gates import judge_history
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tasks.tracking.registry import ModelVersion
from tasks.tracking.runs import KEY

Stages = Mapping[str, Mapping[str, Any]]  # what a run's summary says of each stage, by its name


class Assessment(NamedTuple):
    """What the gates say about the policy that would be promoted."""

    choice: Choice
    results: list[GateResult]  # none of a policy that is the champion already
    off: list[str]  # gates that the settings switch off
    champion: ModelVersion | None
    is_champion: bool

    @property
    def sentence(self) -> str:
        """Return in one sentence what would become of the policy, and which gate refuses it."""
        policy, refused = TITLES[self.choice.policy], [one.name for one in failures(self.results)]
        if self.is_champion:
            assert self.champion is not None
            return f"{policy} is the champion already (version {self.champion.version})."
        if not self.results:
            return f"No gate is on, so nothing holds {policy} back."
        if not refused:
            all_gates = f"all {len(self.results)} gates" if len(self.results) > 1 else "the only gate"
            return f"{policy} passes {all_gates}."
        names = " and ".join(filter(None, [", ".join(refused[:-1]), refused[-1]]))
        return f"The gate{'s' * (len(refused) > 1)} {names} refuse{'s' * (len(refused) == 1)} {policy}."


def assess(
    tracker: Tracker,
    promotion: Promotion,
    profile: str,
    metrics: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, Any]],
) -> Assessment | None:
    """Return what the gates say about the policy that the settings choose; None if it was not trained.

    ``metrics`` are those of the run's summary, ``stages`` what it says of each stage. Registers nothing.
    """
    choice = choose(promotion, metrics, [name for name in TRAINED if name in stages])
    if choice is None:
        return None
    versions = registry.list_versions(tracker, promotion.model_name(profile))
    champion = next((one for one in versions if registry.CHAMPION in one.aliases), None)
    own = next((one for one in versions if one.tags.get(KEY) == stages[choice.policy]["key"]), None)
    known = _known(champion)
    is_same = known is not None and known.digest == stages[choice.policy]["digest"]  # under another key, too
    if (own and own == champion) or is_same:
        return Assessment(choice, [], [], champion, is_champion=True)
    data, answers = (_manifest(tracker, name, stages) for name in ("data", "answers"))
    evidence = Evidence(
        metrics=metrics,
        warnings={name: stage["warnings"] for name, stage in stages.items()},
        data_read=data["created"] if data else None,
        now=time.time(),
        compared=answers["origins"].get("champion", "") if answers else "",
        digests={name: stages[name]["digest"] for name in TRAINED if name in stages},
    )
    results = evaluate(promotion.gates, choice, evidence, known)
    results += judge_history(profile, own, champion)
    off = [name for name, threshold in promotion.gates.model_dump().items() if threshold is None]
    return Assessment(choice, results, off, champion, is_champion=False)


def _manifest(tracker: Tracker, stage: str, stages: Stages) -> Any:
    return find_manifest(tracker, stage, stages[stage]["key"]) if stage in stages else None


def _known(champion: ModelVersion | None) -> Champion | None:
    if champion is None:
        return None
    try:
        digests = json.loads(champion.tags.get(registry.STAGE_DIGESTS, "{}"))
    except ValueError:  # the tag was altered in MLflow's pages
        digests = {}
    return Champion(champion.version, digests.get(champion.tags.get("policy", ""), ""))
