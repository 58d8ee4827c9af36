"""Test the names of flow runs: descriptive ones instead of Prefect's random ones; names that users typed
stay.
"""

import re
from types import SimpleNamespace

import pytest
from prefect.utilities.names import generate_slug

from flows.display import run_names
from tasks.config.pipeline import Pipeline

MADE = re.compile(r"(retrain )?mine 20\d\d-\d\d-\d\d \d\d:\d\d [0-9a-f]{6}")


def name(monkeypatch: pytest.MonkeyPatch, before: str | None, **parameters: object) -> str:
    monkeypatch.setattr(
        run_names, "flow_run", SimpleNamespace(name=before, parameters={"profile": "mine", **parameters})
    )
    return run_names.name_run()


@pytest.mark.parametrize("before", [None, "", "beta3-orionis", "omega-aquarii-prime", "mu-canis-majoris"])
def test_a_name_that_prefect_made_up_is_replaced(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MADE.fullmatch(name(monkeypatch, before, config=Pipeline()))


def test_every_name_of_prefects_own_generator_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [generate_slug(2) for _ in range(200)]
    assert [slug for slug in made if not MADE.fullmatch(name(monkeypatch, slug, config=Pipeline()))] == []


@pytest.mark.parametrize(
    "typed",
    [
        "my-experiment",
        "Lower learning rate",
        "baseline",
        "try 2",
        "mine",
        "alphabet-soup",
        "Beta-test",
        "mine 2026-11-28 18:04 17a1d1",
        "ünï",
    ],
)
def test_a_typed_name_is_kept(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name(monkeypatch, typed, config=Pipeline()) == typed


def test_equal_settings_have_an_equal_key_and_may_come_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(config: object) -> str:
        return name(monkeypatch, None, config=config).rpartition(" ")[2]

    assert key(Pipeline()) == key(Pipeline().model_dump(mode="json")) != key(Pipeline(seed=1))
    assert re.fullmatch(
        "[0-9a-f]{6}", key({"seed": -1, "no": "setting"})
    )  # what is refused later has a name as well
    monkeypatch.setattr(run_names, "flow_run", SimpleNamespace(name=None, parameters={"profile": "mine"}))
    assert MADE.fullmatch(run_names.name_retraining())
