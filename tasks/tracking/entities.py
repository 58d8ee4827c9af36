"""Build MLflow's entities and its monitor from plain values."""

import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModelOutput
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

SAMPLING_SECONDS = 10.0


class DataSet(NamedTuple):
    """A data set that a run reads, as MLflow shows it."""

    name: str
    digest: str  # at most 36 characters
    context: str  # what it is read for, such as training
    source: str  # JSON: its uri, and stage and key of the artifact that it is a part of
    schema: str | None  # JSON in MLflow's format; None: not known
    profile: str  # JSON


def data_set_inputs(data_sets: list[DataSet]) -> "list[DatasetInput]":
    """Return data sets as inputs of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for one in data_sets:
        entity = Dataset(one.name, one.digest, "local", one.source, one.schema, one.profile)
        inputs.append(DatasetInput(entity, [InputTag("mlflow.data.context", one.context)]))
    return inputs


def is_original(source: str) -> bool:
    """Return whether a data set with this source is the user's or a split of it, not a stage's result."""
    return json.loads(source).get("stage", "data") in ("site", "data")


def model_output(model_id: str) -> "LoggedModelOutput":
    """Return a logged model as an output of a run."""
    from mlflow.entities import LoggedModelOutput

    return LoggedModelOutput(model_id, 0)


def system_monitor(run_id: str, uri: str, *, resumed: bool) -> "SystemMetricsMonitor":
    """Return a thread that logs this machine's load to a run, every SAMPLING_SECONDS once it is started."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    return SystemMetricsMonitor(
        run_id, sampling_interval=SAMPLING_SECONDS, resume_logging=resumed, tracking_uri=uri
    )
