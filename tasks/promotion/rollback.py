"""Make an earlier champion the champion again, and say so in the reports of both runs."""

from functools import partial

from tasks.config.policies import TITLES
from tasks.promotion.finished_runs import NAME
from tasks.promotion.promotion import OUTCOME
from tasks.promotion.report_page import decision_as_html, replace_decision, update_report
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tasks.tracking.registry import MAX_TEXT, ModelVersion
from tasks.tracking.runs import FLOW_RUN


def roll_back(tracker: Tracker, model: str, to: str, *, by: str) -> tuple[ModelVersion, ModelVersion]:
    """Make an earlier champion the champion again; return the version left and the one restored.

    ``to`` is its number; "" is the champion before this one. Raises InputError.
    """
    left, restored = registry.roll_back(tracker, model, to, by=by)
    sentence = f"is no longer the champion: {by} has gone back to version {restored.version}."
    _note(tracker, left, "Rolled back", sentence, is_champion=False)
    sentence = f"is the champion again, in place of version {left.version}, decided by {by}."
    _note(tracker, restored, "Promoted", sentence, is_champion=True)
    return left, restored


def _note(tracker: Tracker, version: ModelVersion, title: str, sentence: str, *, is_champion: bool) -> None:
    """Say on the page of a version's run and in its report what became of it, unless the run was deleted."""
    found = tracker.search(f"attributes.run_id = '{version.run_id}'") if version.run_id else []
    for run in found:
        policy = version.tags.get("policy", "")
        name = f"{TITLES.get(policy, policy)} of {run.tags.get(NAME, run.run_id)}"
        said = f"{name} ({version.name} version {version.version}) {sentence}"
        tracker.set_tags(run.run_id, {OUTCOME: f"{title}: {said}"[:MAX_TEXT]})
        content = decision_as_html(f"{title}.", said, passed=is_champion)
        change = partial(replace_decision, content=content)
        update_report(tracker, run.run_id, run.tags.get(FLOW_RUN, ""), change)
