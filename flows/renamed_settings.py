"""Log in a flow run which of its parameters have old names."""

import warnings

from prefect import get_run_logger
from prefect.context import FlowRunContext

from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import RenamedSetting, replace_old_names


def log_renamed_settings() -> None:
    """Log a warning for each setting that the parameters of this flow run give under its old name.

    Prefect validates the parameters before the flow begins, when there is no log yet, so they are read again
    here.
    """
    context = FlowRunContext.get()
    parameters = context.flow_run.parameters if context and context.flow_run else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RenamedSetting)
        replace_old_names([Pipeline], parameters.get("config"))
    for warning in caught:
        get_run_logger().warning("%s", warning.message)
