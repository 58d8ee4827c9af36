"""Create Prefect's automations: mark lost runs, restart lost pipelines, send failures to a webhook, resume
rounds whose labels are in.
"""

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook, ChangeFlowRunState, ResumeFlowRun
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.states import StateType

from flows.services.heartbeat import ALIVE, BEAT_SECONDS, WAITING

BEATS = 3  # heartbeats that may be missed
RESTARTS = (
    3  # how often a pipeline is started again that has begun and lost its process; Retry is always possible
)
PAUSE_SECONDS = 15  # before it is; the worker puts the last process away meanwhile
LOST = "alignflow: a run without heartbeat has crashed"
AGAIN = "alignflow: a crashed pipeline is started again"
ALERT = "alignflow: failures are told"
LABELLED = "alignflow: a run goes on when its labels are in"
LABELS_IN = "alignflow.labels.complete"  # event
BLOCK = "alignflow-alert"
RUNS = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
# Signs that a run is not lost: the next heartbeat, or a state in which it need not beat. Not Prefect's own
# heartbeats, which go on in other states than Running, and not Running itself: a run that is resumed beats
# again.
SIGNS = {ALIVE, WAITING} | {
    f"prefect.flow-run.{name}"
    for name in (
        "Scheduled", "Late", "Resuming", "AwaitingRetry", "AwaitingConcurrencySlot", "Pending", "Paused",
        "Suspended",
        "Completed", "Cached", "Cancelled", "Cancelling", "Crashed", "Failed", "TimedOut",
    )
}  # fmt: skip
# runs of the deployments with this tag: stages are restarted, and their failures reported, by the pipeline
# that waits for them
PIPELINES = ResourceSpecification(
    {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.pipeline"}
)
# one text, as chat services take it: the run, its state, the failed stage's message, and where
# to look
_WORDS = (
    "flow.name",
    '"/"',
    "flow_run.name",
    '" "',
    "flow_run.state.name",
    '": "',
    "flow_run.state.message",
    '" "',
    "(flow_run | ui_url)",
)
PAYLOAD = f'{{"text": {{{{ ({" ~ ".join(_WORDS)}) | tojson }}}}}}'


def create_automations(webhook: str = "") -> None:
    """Create the automations, or replace older ones. Without ``webhook`` (a URL) failures are not sent."""
    wanted = [_lost(), _again(), _labelled()] + ([_alert(webhook)] if webhook else [])
    with get_client(sync_client=True) as client:
        for name in (LOST, AGAIN, ALERT, LABELLED):
            for old in client.read_automations_by_name(name):
                client.delete_automation(old.id)
        for automation in wanted:
            client.create_automation(automation)


def _lost(seconds: float = BEATS * BEAT_SECONDS) -> AutomationCore:
    """Mark a run as Crashed if its heartbeats stop while it is Running: its process or machine is lost."""
    trigger = EventTrigger(
        after={ALIVE}, expect=SIGNS, match=RUNS,
        for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1,
        within=timedelta(seconds=seconds),
    )  # fmt: skip
    message = f"Nothing was heard of it for {seconds:.0f} s: its process, worker or machine is gone."
    return AutomationCore(
        name=LOST,
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)],
    )


def _again() -> AutomationCore:
    """Restart a pipeline that was killed; it finds its finished stages in the store.

    A stage that was lost is restarted by its pipeline.
    """
    runs = ResourceSpecification(
        RUNS.root | {"prefect.run-count": [str(count) for count in range(1, RESTARTS + 1)]}
    )
    trigger = EventTrigger(
        after={"prefect.flow-run.Crashed"}, expect={"prefect.flow-run.*"}, match=runs,
        match_related=PIPELINES, for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1,
        within=timedelta(seconds=PAUSE_SECONDS),
    )  # fmt: skip
    message = "It had crashed and is started again; finished stages are not repeated."
    return AutomationCore(
        name=AGAIN,
        trigger=trigger,
        actions=[ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)],
    )


def _labelled() -> AutomationCore:
    """Resume the run that an event is about, which is suspended until people have labelled its pairs."""
    trigger = EventTrigger(
        expect={LABELS_IN}, match=RUNS, for_each={"prefect.resource.id"}, posture=Posture.Reactive,
        threshold=1, within=timedelta(0),
    )  # fmt: skip
    return AutomationCore(name=LABELLED, trigger=trigger, actions=[ResumeFlowRun()])


def _alert(webhook: str) -> AutomationCore:
    from prefect.blocks.webhook import Webhook

    block = Webhook(method="POST", url=webhook, allow_private_urls=True).save(BLOCK, overwrite=True)
    trigger = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, match=RUNS,
        match_related=PIPELINES,
        for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1, within=timedelta(0),
    )  # fmt: skip
    return AutomationCore(
        name=ALERT, trigger=trigger, actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)]
    )
