"""The fine-tuned adapter folded into its base."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifact import Artifact, Step, only, within
from tasks.programs.config import MergeJob, Pipeline
from tasks.stage import Seat, run_stage
from tasks.states import AS_TASK, as_state
from tasks.weights import places


def step(config: Pipeline, *, base: Artifact, adapter: Artifact) -> Step:
    return Step("merge", MergeJob.of(config), {"base": within(base, "model"), "adapter": only(adapter, *places(config.sft))})


@task(name="merge", **AS_TASK)
def run(config: Pipeline, *, seat: Seat, base: Artifact, adapter: Artifact) -> State:
    """Merge the adapter into the base model."""
    return as_state(run_stage(step(config, base=base, adapter=adapter), seat))
