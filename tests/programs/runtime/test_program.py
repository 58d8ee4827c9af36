"""Test what programs write: always valid JSON, without NaN or infinity."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tasks.programs.runtime.program import Run, to_json
from tasks.system.errors import InputError
from tests.support import tiny


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tiny.write_job(tmp_path / "job", "sft", {}, {}))


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_refused_with_its_step(run: Run, value: float) -> None:
    run.log(1, 3, loss=1.0)
    with pytest.raises(InputError, match=f"^accuracy is {value} in step 2: training has diverged"):
        run.log(2, 3, loss=1.0, accuracy=value)
    assert [
        line["step"] for line in map(strict, (run.directory / "metrics.jsonl").read_text().splitlines())
    ] == [1]
    with pytest.raises(InputError, match=f"^sft.loss is {value}: "):
        run.finish({"sft.loss": value})
    assert not list(run.artifact.iterdir())


def test_what_is_undefined_is_left_out_and_what_has_no_bound_is_null(run: Run) -> None:
    run.log(1, 1, loss=1.0)
    defined = {"value": 0.5, "low": -math.inf, "high": math.inf, "n": 1}
    run.finish({"a": defined, "b": {"value": math.nan, "low": -1.0, "high": 1.0, "n": 2}, "c": 3})
    summary = strict((run.artifact / "summary.json").read_text())
    assert summary["metrics"] == {"a": {"value": 0.5, "low": None, "high": None, "n": 1}, "c": 3}
    run.note("measures.json", {"correlation": {"value": math.nan, "n": 2}, "kept": (1, 2.5, "NaN")})
    assert strict((run.artifact / "measures.json").read_text()) == {
        "correlation": {"value": None, "n": 2},
        "kept": [1, 2.5, "NaN"],
    }


def test_a_resumed_program_goes_on_behind_the_samples_of_its_checkpoint(run: Run) -> None:
    for step in (0, 5, 10):
        run.log(step, 10, loss=1.0)
        run.record_sample(step, [{"answer": "a", "kl": math.nan}])
    with (run.directory / "samples.jsonl").open("a") as file:
        file.write('{"step": 15, "answ')  # killed as it wrote
    assert run.sampled_steps() == {0, 5, 10}
    run.rewind(5)
    assert run.sampled_steps() == {0, 5}
    run.record_sample(10, [])
    run.finish({})
    kept = [strict(line) for line in (run.artifact / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [0, 5, 10]
    assert kept[0]["answers"] == [{"answer": "a", "kl": None}]


def test_finite_values_are_written_as_before() -> None:
    value = {"b": [1, 2.5, 1e-30], "a": {"x": True, "y": None, "z": "text"}}
    assert to_json(value, indent=1, sort_keys=True) == json.dumps(value, indent=1, sort_keys=True) + "\n"
