"""Save a view of MLflow's table of runs in which the headline metrics are columns.

MLflow shows no metric in that table until it is chosen. Its menu "Views" lists the views that are stored as
tags of the experiment, in the format of MLflow 3.17's pages.
"""

import base64
import json
import zlib
from typing import Any

from tasks.tracking.client import Tracker

HEADLINE = "core"  # MLflow shows groups of metrics in alphabetical order: this is the first
VIEW = "alignflow-runs"
TAG = f"mlflow.sharedViewState.{VIEW}"
NAME = "Results of all runs"
METRICS = (
    "ppo_win_rate",
    "dpo_win_rate",
    "ppo_kl",
    "dpo_kl",
    "ppo_perplexity_tax",
    "dpo_perplexity_tax",
    "worst_attack",
    "judge_agreement",
)
TAGS = ("alignflow.profile", "judge", "source", "base", "seed")


def save_view(tracker: Tracker) -> None:
    """Save the view for the experiment, unless it is there."""
    experiment = tracker.call(lambda client: client.get_experiment(tracker.experiment))
    content = _content()
    if experiment.tags.get(TAG) != content:
        tracker.call(lambda client: client.set_experiment_tag(tracker.experiment, TAG, content))


def view_path(tracker: Tracker) -> str:
    """Return the address of the view from any page of MLflow."""
    query = f"viewStateShareKey={VIEW}&workflowType=machine_learning"
    return f"#/experiments/{tracker.experiment}/runs?{query}"


def _content() -> str:
    columns = [f"metrics.`{HEADLINE}/{name}`" for name in METRICS] + [f"tags.`{name}`" for name in TAGS]
    state: dict[str, Any] = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_10_RUNS",
        "hideEmptyCharts": True,
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
