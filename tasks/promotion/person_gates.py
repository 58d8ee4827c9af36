"""Find what only a person may overrule: these gates refuse a policy unless a person decides."""

from collections.abc import Sequence

from tasks.promotion.gate_results import GateResult
from tasks.tracking.registry import ROLLED_BACK_AT, ROLLED_BACK_BY, ModelVersion
from tasks.tracking.runs import PROFILE

ROLLED_BACK, CHAMPION_PROFILE = "rolled_back", "champion_profile"
DECIDES = "a person decides (`alignflow promote RUN --yes`, or promotion.approval=person)"


def judge_history(
    profile: str, version: ModelVersion | None, champion: ModelVersion | None
) -> list[GateResult]:
    """Return a result for each thing that a person must know before the policy is promoted.

    ``version`` is that of the policy, if it is registered already; ``profile`` is that of its run.
    """
    results, limit = [], "unless a person decides"
    if version and (moment := version.tags.get(ROLLED_BACK_AT)):
        by = version.tags.get(ROLLED_BACK_BY, "")
        sentence = f"Version {version.version} was rolled back by {by} on {moment}, so {DECIDES}."
        results.append(GateResult(ROLLED_BACK, False, moment, f"not {limit}", sentence))
    theirs = champion.tags.get(PROFILE, profile) if champion else profile
    if champion and theirs != profile:
        sentence = (
            f"The champion (version {champion.version}) is of the profile {theirs} and not of {profile}: "
            f"give promotion.model another name, or {DECIDES}."
        )
        results.append(GateResult(CHAMPION_PROFILE, False, theirs, f"{profile} {limit}", sentence))
    return results


def not_overruled(failed: Sequence[GateResult], *, by_person: bool) -> list[GateResult]:
    """Return the failed gates that refuse a policy: a person overrules those of this file."""
    return [one for one in failed if not (by_person and one.name in (ROLLED_BACK, CHAMPION_PROFILE))]
