"""Set the options of a stage's Prefect task, and return its state."""

from collections.abc import Mapping
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import task_run
from prefect.states import Completed, Pending

from tasks.artifacts.artifact import Artifact

# Results are JSON, and what is reused is the store's decision alone.
AS_TASK: dict[str, Any] = {
    "cache_policy": NO_CACHE, "persist_result": True, "result_serializer": "json",
    "task_run_name": lambda: str(task_run.task_name),  # in the graph; by default Prefect adds random letters
}  # fmt: skip


def as_state(artifact: Artifact) -> State:
    """Return the final state of a stage, named Cached if its artifact was reused."""
    name = "Cached" if artifact["cached"] else "Completed"
    return Completed(name=name, message=f"{artifact['stage']} {artifact['key'][:12]}", data=artifact)


def present(artifacts: Mapping[str, Artifact | Exception | None]) -> dict[str, Artifact]:
    """Return the artifacts that were built: Prefect passes an exception or None in place of the others."""
    return {name: found for name, found in artifacts.items() if isinstance(found, dict)}


def not_ready(message: str) -> State:
    """Return the state of a stage that cannot run because stages before it failed, as Prefect names it."""
    return Pending(name="NotReady", message=message)
