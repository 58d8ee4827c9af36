"""Promote the policy of a finished run: judge it by the gates, ask a person if wanted, move the alias."""

from typing import Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from flows.display.run_names import name_promotion
from flows.services.heartbeat import heartbeat
from tasks.config.sections.gates import Promotion
from tasks.promotion import promotion as steps
from tasks.promotion.finished_runs import connect, find_run
from tasks.promotion.promotion import Ending, Proposal
from tasks.rounds.round_runs import ChosenRun, choose_run
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.run_notes import escape

HOUR_SECONDS = 3600
PINNED = "alignflow.promotion_flow."  # prefix of a tag of a pipeline's run; the rest is the flow run about it
NO_REASON = "true"  # value of that tag if nothing is to be said of why the run was chosen
AUTOMATIC = "the gates"


class Decision(RunInput):
    """The form that a person answers in Prefect's pages."""

    decision: Literal["promote", "reject"] = Field("reject", description="What becomes of it.")
    name: str = Field(min_length=1, description="Who decides; kept with the version.")
    note: str = Field("", description="Why; kept with the version.")


@flow(name="promote", flow_run_name=name_promotion, persist_result=True, result_serializer="json")
def promote(promotion: Promotion = Promotion(), profile: str = "", run: str = "") -> State:  # noqa: B008
    """Register the policy of a finished run, and make it the champion if it passes the gates.

    Args:
        promotion: Which policy, which gates, and whether a person decides.
        profile: Take the newest run of this profile, of rounds the last one that won; empty: of any profile.
        run: Take this run instead: its id in MLflow or Prefect, or its name.
    """
    with heartbeat():
        tracker = process_tracker()
        connect(tracker)
        chosen = pin_run(tracker, run, profile)
        proposal = steps.propose(tracker, promotion, chosen.run)
        evidence = f"{steps.describe(proposal)}\n{escape(chosen.reason)}".strip()
        ending = steps.challenge(tracker, proposal, by_person=promotion.approval == "person")
        if ending.outcome != "Unchanged":
            create_markdown_artifact(evidence, key="promotion", description=proposal.title)
        if ending.outcome == "Challenger":
            ending = _decide(tracker, promotion, proposal, evidence)
        return Completed(name=ending.outcome, message=f"{chosen.reason} {ending.sentence}".strip())


def pin_run(tracker: Tracker, run: str, profile: str) -> ChosenRun:
    """Return the run that is meant, and the same one when the flow run continues after a person's answer.

    A run may have been finished meanwhile, and the process, or even the machine, is another one.
    """
    tag = f"{PINNED}{flow_run.id}"
    pinned = tracker.search(f"tags.`{tag}` LIKE '%'")
    if pinned:
        reason = pinned[0].tags[tag]
        return ChosenRun(find_run(tracker, pinned[0].run_id), "" if reason == NO_REASON else reason)
    chosen = choose_run(tracker, run, profile=profile)
    tracker.set_tags(chosen.run.run_id, {tag: chosen.reason or NO_REASON})
    return chosen


def _decide(tracker: Tracker, promotion: Promotion, proposal: Proposal, evidence: str) -> Ending:
    """Promote a challenger at once, or suspend the flow run until a person has answered."""
    if promotion.approval == "automatic":
        return steps.promote(tracker, proposal, by=AUTOMATIC)
    form = Decision.with_initial_data(description=evidence)
    try:
        answer = suspend_flow_run(wait_for_input=form, timeout=int(promotion.timeout_hours * HOUR_SECONDS))
    except ObjectNotFound as error:
        raise InputError(
            "There was no answer in time, and each flow run asks once: start another run of this deployment"
        ) from error
    decide = steps.promote if answer.decision == "promote" else steps.reject
    return decide(tracker, proposal, by=answer.name, note=answer.note)
