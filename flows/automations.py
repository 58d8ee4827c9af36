"""What the Prefect server does by itself: it notices lost machines, and sends the failures of pipelines to a webhook."""

from datetime import timedelta

from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY
from prefect.states import StateType

BEATS = 3  # heartbeats that may be missed
LOST = "alignflow: a run without heartbeat has crashed"
ALERT = "alignflow: failures are told"
BLOCK = "alignflow-alert"
RUNS = ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"})
# runs of the deployments with this tag: stages are started again, and their failures told, by the pipeline that waits for them
PIPELINES = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.pipeline"})
# one text, as chat services take it: which run, what became of it, the failed stage's own sentence, and where to look
_WORDS = ("flow.name", '"/"', "flow_run.name", '" "', "flow_run.state.name", '": "', "flow_run.state.message", '" "', "(flow_run | ui_url)")
PAYLOAD = f'{{"text": {{{{ ({" ~ ".join(_WORDS)}) | tojson }}}}}}'


def automate(webhook: str = "") -> None:
    """Make the automations, or bring them up to date. Without ``webhook`` (a URL) an earlier alert stays as it is."""
    wanted = [_lost()]
    if webhook:
        wanted.append(_alert(webhook))
    with get_client(sync_client=True) as client:
        for automation in wanted:
            for old in client.read_automations_by_name(automation.name):
                client.delete_automation(old.id)
            client.create_automation(automation)


def _lost() -> AutomationCore:
    """Every flow run beats; one that has stopped without an end has lost its process, its worker or its machine."""
    beat = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value() or 30
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"}, expect={"prefect.flow-run.*"}, match=RUNS,
        for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1, within=timedelta(seconds=BEATS * beat),
    )  # fmt: skip
    message = f"Nothing was heard of it for {BEATS * beat} s: its process, worker or machine is gone."
    return AutomationCore(name=LOST, trigger=trigger, actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=message)])


def _alert(webhook: str) -> AutomationCore:
    from prefect.blocks.webhook import Webhook

    block = Webhook(method="POST", url=webhook, allow_private_urls=True).save(BLOCK, overwrite=True)
    trigger = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, match=RUNS,
        match_related=PIPELINES,
        for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1, within=timedelta(0),
    )  # fmt: skip
    return AutomationCore(name=ALERT, trigger=trigger, actions=[CallWebhook(block_document_id=block, payload=PAYLOAD)])
