"""An adapter fine-tuned on the best answer of each question."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.programs.config import Pipeline, SftJob
from tasks.stage import AS_TASK, Artifact, Seat, Step, as_state, run_stage, within


def step(config: Pipeline, *, data: Artifact, base: Artifact) -> Step:
    return Step("sft", SftJob.of(config), {"data": data, "base": within(base, "model")}, shown=("loss", "perplexity"))


@task(name="sft", **AS_TASK)
def run(config: Pipeline, *, seat: Seat, data: Artifact, base: Artifact) -> State:
    """Fine-tune the base model."""
    return as_state(run_stage(step(config, data=data, base=base), seat))
