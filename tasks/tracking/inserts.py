"""Insert rows into MLflow's database that another process may insert at the same moment."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tasks.tracking.client import Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_ATTEMPTS = 6
PAUSE_SECONDS = 0.2


def insert(tracker: Tracker, function: "Callable[[MlflowClient], Any]") -> None:
    """Call a function of MLflow's client that inserts the rows that are not there yet.

    MLflow looks which rows are there and inserts the others, without a lock: of two stages that read the same
    data set at the same time one gets an error of the database. The next time its rows are found there.
    """
    for attempt in range(MAX_ATTEMPTS):
        try:
            tracker.call(function)
        except Exception as error:
            if not is_duplicate(error) or attempt == MAX_ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_SECONDS * (attempt + 1))
        else:
            return


def is_duplicate(error: Exception) -> bool:
    """Return whether a database has refused a row that it has already, as SQLite and PostgreSQL say it."""
    return "unique" in str(error).lower()
