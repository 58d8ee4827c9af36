"""Settings under their old names: every way in takes them, warns, and refuses both names at once."""

import json
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows import cli, stage
from flows.profiles import load
from tasks.config.jobs import PpoJob
from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import RenamedSetting, Settings, is_section, types_of_setting
from tasks.config.sections.data import Data
from tasks.config.sections.ppo import Ppo
from tasks.config.sections.reward import Reward
from tasks.execution.run_stage import describe_job, write_job
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tests.support import fake_programs

WARNING = "reward.caution is now called reward.uncertainty_penalty; the old name will stop working"
BOTH = "reward: caution is the old name of uncertainty_penalty; give uncertainty_penalty alone"


def sections(types: set[Any], place: str = "") -> Iterator[tuple[str, type[Settings]]]:
    """Yield every section of the settings with its dotted name."""
    for section in filter(is_section, types):
        yield place, section
        for name in section.model_fields:
            yield from sections(types_of_setting([section], name), f"{place}.{name}".lstrip("."))


def test_an_old_name_stands_for_a_setting_that_is_there() -> None:
    found = {place: section.old_names for place, section in sections({Pipeline}) if section.old_names}
    assert found == {
        "data": {"against": "decontaminate_against"},
        "ppo": {"accept_fooled": "allow_exploitable"},
        "reward": {
            "attacked": "red_team_answers",
            "caution": "uncertainty_penalty",
            "head_start": "age_bias",
            "most_answers": "max_answers",
        },
    }
    for section in (Data, Ppo, Reward):
        assert set(section.old_names.values()) <= set(section.model_fields)
        assert not set(section.old_names) & set(section.model_fields)


def from_yaml(settings: dict[str, Any]) -> Pipeline:
    Path("mine.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return load("mine.yaml", [])


def from_arguments(settings: dict[str, Any]) -> Pipeline:
    values = {
        f"{place}.{name}": value for place, section in settings.items() for name, value in section.items()
    }
    return load("demo", [f"{name}={json.dumps(value)}" for name, value in values.items()])


def from_inline_sections(settings: dict[str, Any]) -> Pipeline:
    return load("demo", [f"{place}={json.dumps(section)}" for place, section in settings.items()])


WAYS_IN = [from_yaml, from_arguments, from_inline_sections, Pipeline.model_validate]


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("read", WAYS_IN)
def test_old_names_are_taken_from_everywhere_with_one_warning_each(read: Callable[..., Pipeline]) -> None:
    settings = {
        "data": {"against": ["a.txt"]},
        "ppo": {"accept_fooled": False},
        "reward": {"attacked": 7, "caution": 0.25, "head_start": True, "most_answers": 4},
    }
    with pytest.warns(RenamedSetting) as caught:
        config = read(settings)
    assert config.data.decontaminate_against == ("a.txt",)
    assert config.ppo.allow_exploitable is False
    reward = config.reward
    assert (reward.red_team_answers, reward.uncertainty_penalty) == (7, 0.25)
    assert (reward.age_bias, reward.max_answers) == (True, 4)
    told = sorted(str(warning.message).partition(";")[0] for warning in caught)
    assert told == [
        "data.against is now called data.decontaminate_against",
        "ppo.accept_fooled is now called ppo.allow_exploitable",
        "reward.attacked is now called reward.red_team_answers",
        "reward.caution is now called reward.uncertainty_penalty",
        "reward.head_start is now called reward.age_bias",
        "reward.most_answers is now called reward.max_answers",
    ]


@pytest.mark.parametrize("read", WAYS_IN)
def test_both_names_of_a_setting_are_refused(read: Callable[..., Pipeline]) -> None:
    with pytest.raises((InputError, ValidationError)) as error:
        read({"reward": {"caution": 1, "uncertainty_penalty": 1}})
    if isinstance(error.value, ValidationError):
        (refusal,) = error.value.errors()
        assert f"{refusal['loc'][0]}: {refusal['ctx']['error']}" == BOTH
    else:
        assert str(error.value) == BOTH


@pytest.mark.parametrize("names", [("caution", "uncertainty_penalty"), ("uncertainty_penalty", "caution")])
def test_the_command_line_changes_what_the_profile_calls_by_the_other_name(names: tuple[str, str]) -> None:
    Path("mine.yaml").write_text(f"reward: {{{names[0]}: 1}}")
    with pytest.warns(RenamedSetting):
        assert load("mine.yaml", [f"reward.{names[1]}=2"]).reward.uncertainty_penalty == 2


def test_an_old_name_with_a_bad_value_is_refused_by_its_current_name() -> None:
    with (
        pytest.warns(RenamedSetting),
        pytest.raises(InputError, match=r"^reward\.uncertainty_penalty must be"),
    ):
        load("demo", ["reward.caution=-1"])


def test_current_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("demo", ["reward.uncertainty_penalty=1", "ppo.allow_exploitable=false"])
        Pipeline.model_validate(Pipeline().model_dump())


def test_a_job_that_was_written_before_runs(tmp_path: Path) -> None:
    step = stage.as_step("ppo", PpoJob.of(Pipeline()).model_dump(mode="json"), {}, [])
    write_job(tmp_path, describe_job(step, Pipeline().machine, Tracker(tmp_path, "")))
    text = (tmp_path / "job.json").read_text()
    (tmp_path / "job.json").write_text(text.replace('"allow_exploitable": true', '"accept_fooled": false'))
    with pytest.warns(RenamedSetting, match=r"ppo\.accept_fooled is now called ppo\.allow_exploitable"):
        assert PpoJob.model_validate(Run(tmp_path).record).ppo.allow_exploitable is False


def test_the_command_line_prints_each_old_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("reward: {caution: 1}")
    options = ["--set", "reward.caution=2", "--set", "ppo.accept_fooled=no"]
    assert cli.main(["job", "mine.yaml", "site", "work", *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "alignflow: reward.caution is now called reward.uncertainty_penalty",
        "alignflow: ppo.accept_fooled is now called ppo.allow_exploitable",
    ]


FLOW = """
from flows.services import environment
from flows.services.processes import start_prefect_api
from tasks.artifacts.store import home

environment.use_running_servers(home())
environment.prepare(home())
api = start_prefect_api(home())
from flows.pipeline import rlhf

api.wait()
rlhf(config={"reward": {"caution": 1.0}, "source": {"kind": "own", "path": "./nowhere"}})
"""


def test_a_flow_run_logs_the_old_names_of_its_parameters(tmp_path: Path) -> None:
    tree, home = fake_programs.make_tree(tmp_path / "tree"), tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FLOW],
        cwd=tree,
        env=fake_programs.environment(tree, home),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert "there is no file or folder nowhere" in done.stderr
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        found = database.execute("select message from log where message like '%is now called%'").fetchall()
    database.close()
    assert len(found) == 1
    assert found[0][0].startswith(WARNING)
