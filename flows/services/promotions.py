"""Start the promotion of a run as a flow run of its own: it may wait for a person for days."""

from typing import cast

from prefect import get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment

from tasks.config.sections.gates import Promotion


def start_promotion(promotion: Promotion, profile: str, *, run: str) -> bool:
    """Start a run of the deployment promote/PROFILE and do not wait for it; return whether it was started.

    ``run`` is the id, in MLflow or Prefect, of the run whose policy is meant. What has been built is not lost
    if the promotion cannot be started: a warning in the flow run's log says why, and what to do by hand.
    """
    logger, by_hand = get_run_logger(), f"`alignflow promote {run}` does it by hand"
    name = f"promote/{deployment.name or profile}"
    parameters = {"promotion": promotion.model_dump(mode="json"), "profile": profile, "run": run}
    try:
        started = cast(FlowRun, run_deployment(name, parameters=parameters, timeout=0, as_subflow=False))
    except ObjectNotFound:
        text = f"There is no deployment {name}, so nothing is promoted: `alignflow deploy` makes it"
        logger.warning("%s; %s", text, by_hand)
        return False
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        logger.warning("%s could not be started (%s); %s", name, reason, by_hand)
        return False
    logger.info("The promotion goes on in the flow run %s", started.name)
    return True
