"""Test the user's reward models and functions: their place in the key, and what is refused early."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.preflight import check_inputs
from flows.profiles import load, with_absolute_paths
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.reward_sources import function_digests, reward_models
from tasks.config.pipeline import Pipeline
from tasks.stages.ppo import ppo
from tasks.system.errors import InputError
from tasks.system.module_sources import source_files
from tests.support import tiny

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(**files: str) -> None:
        for name, text in files.items():
            path = folder / f"{name.replace('_in_', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write


def whole(stage: str) -> Artifact:
    files = {"finetune.parquet": "f", "rl.parquet": "r", "evaluation.parquet": "e", "reward.json": "j"}
    files |= {"adapter/a": "w", "model/m": "w"}
    return Artifact(
        stage=stage, key="k", digest="d", path="", files=files, seconds=0.0, peak_mb=0.0, cached=True,
        metrics={}, warnings=[],
    )  # fmt: skip


def settings(*changed: str) -> Pipeline:
    return load("demo", list(changed))


def of_function(name: str) -> Pipeline:
    return settings(f"ppo.rewards.functions=[{{name: f, function: '{name}', weight: 0.5}}]")


def key(config: Pipeline) -> str:
    step = ppo.step(config, data=whole("data"), model=whole("merge"), reward=whole("reward"))
    return step.recipe.key


def test_a_changed_function_is_no_hit(write: Write) -> None:
    write(my_rewards="def f(q, a):\n    return [0.0] * len(a)\n")
    keys = [key(of_function("my_rewards:f"))] * 2
    write(my_rewards="def f(q, a):\n    return [1.0] * len(a)\n")
    keys.append(key(of_function("my_rewards:f")))
    assert keys[0] == keys[1] != keys[2]
    assert key(settings()) not in keys


def test_what_a_function_imports_from_beside_it_counts_and_nothing_else(write: Write) -> None:
    write(
        own_in_rewards="import json\nimport numpy\nfrom own.words import count\nfrom . import more\n"
        "\ndef f(q, a): ...\n",
        own_in_words="def count(): ...\n",
        own_in_more="import helper\n",
        own_in_unused="x = 1\n",
        helper="y = 1\n",
        other="z = 1\n",
    )
    write(own_in___init__="")
    assert list(source_files("own.rewards")) == ["helper", "own", "own.more", "own.rewards", "own.words"]
    before = function_digests(of_function("own.rewards:f").ppo.rewards)
    write(other="z = 2\n", own_in_unused="x = 2\n")
    assert function_digests(of_function("own.rewards:f").ppo.rewards) == before
    write(helper="y = 2\n")
    assert function_digests(of_function("own.rewards:f").ppo.rewards) != before


def test_packages_without_an_init_file_are_found(write: Write, tmp_path: Path) -> None:
    (tmp_path / "code" / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "code" / "outer" / "inner" / "rewards.py").write_text(
        "from outer.inner import more\n\ndef f(): ...\n"
    )
    (tmp_path / "code" / "outer" / "inner" / "more.py").write_text("")
    assert list(source_files("outer.inner.rewards")) == ["outer.inner.more", "outer.inner.rewards"]
    check_inputs(of_function("outer.inner.rewards:f"))


def test_no_code_of_the_users_runs_here(write: Write) -> None:
    write(my_rewards="raise RuntimeError\n\ndef f(q, a): ...\n", own_in_rewards="def f(q, a): ...\n")
    write(own_in___init__="raise RuntimeError\n")
    check_inputs(of_function("my_rewards:f"))
    check_inputs(of_function("own.rewards:f"))


def test_an_installed_module_counts_with_its_own_package_alone() -> None:
    names = {name.partition(".")[0] for name in source_files("yaml.loader")}
    assert names == {"yaml"}


def test_an_environment_inside_the_checkout_does_not_count(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / "code" / ".venv" / "lib" / "site-packages"
    environment.mkdir(parents=True)
    (environment / "installed_here.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(environment))
    write(my_rewards="import installed_here\nimport helper\n", helper="")
    assert list(source_files("my_rewards")) == ["helper", "my_rewards"]
    assert list(source_files("installed_here")) == ["installed_here"]


@pytest.mark.parametrize(
    ("code", "name", "sentence"),
    [
        (
            "def length(q, a): ...\n",
            "none.such:f",
            "there is no module none.such that can be imported: install it",
        ),
        ("def length(q, a): ...\n", "my_rewards:lenght", "has no function lenght; did you mean length[?]$"),
        ("def length(q, a:\n", "my_rewards:length", r"my_rewards\.py is no Python, line 1: "),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_runs(
    write: Write, code: str, name: str, sentence: str
) -> None:
    write(my_rewards=code)
    with pytest.raises(InputError, match=r"^ppo\.rewards\.functions f: .*" + sentence):
        check_inputs(of_function(name))


def of_models(*models: str) -> Pipeline:
    return settings(f"ppo.rewards.models=[{', '.join(models)}]")


def test_a_model_is_an_input_known_by_its_content(tmp_path: Path) -> None:
    folder = tiny.base_folder(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    shutil.copytree(folder, tmp_path / "three")
    (tmp_path / "three" / "config.json").write_text((folder / "config.json").read_text() + " ")
    keys = [key(of_models(f"{{name: m, path: {tmp_path / name}}}")) for name in ("one", "two", "three")]
    assert keys[0] == keys[1] != keys[2]
    assert key(of_models(f"{{name: m, path: {folder}, weight: 0.5}}")) != keys[0]
    inputs = reward_models(of_models(f"{{name: m, path: {folder}, base: {tmp_path / 'two'}}}").ppo.rewards)
    assert {name: artifact["path"] for name, artifact in inputs.items()} == {
        "reward_m": str(folder),
        "base_m": str(tmp_path / "two"),
    }


def test_only_a_mix_reads_reference_answers(write: Write) -> None:
    write(my_rewards="def f(q, a): ...\n")

    def files(config: Pipeline) -> list[str]:
        step = ppo.step(config, data=whole("data"), model=whole("merge"), reward=whole("reward"))
        return list(step.inputs["data"]["files"])

    assert "finetune.parquet" not in files(settings())
    assert "finetune.parquet" in files(of_function("my_rewards:f"))


def test_relative_folders_are_made_absolute(tmp_path: Path) -> None:
    for name in ("reward", "base"):
        (tmp_path / name).mkdir()
    config = with_absolute_paths(of_models("{name: m, path: reward, base: base}"), tmp_path)
    (model,) = config.ppo.rewards.models
    assert [model.path, model.base] == [os.path.join(tmp_path, name) for name in ("reward", "base")]


def broken(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
    (folder / "reward.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("make", "more", "sentence"),
    [
        (lambda folder: folder, "", "there is no folder .*m$"),
        (lambda folder: broken(folder, "other"), "", "has reward.json and neither adapter/ nor model/"),
        (lambda folder: broken(folder, "model"), ", base: no", "has weights of its own and needs no base"),
        (lambda folder: broken(folder, "adapter"), ", base: no", "there is no folder no, which base names"),
        (lambda folder: folder.mkdir() or folder, "", "the model folder .* has no config.json$"),
    ],
)  # fmt: skip
def test_a_folder_without_a_reward_model_is_refused_before_anything_runs(
    tmp_path: Path, make: Callable[[Path], Any], more: str, sentence: str
) -> None:
    config = of_models(f"{{name: m, path: {make(tmp_path / 'm')}{more}}}")
    with pytest.raises(InputError, match=r"^ppo\.rewards\.models m: .*" + sentence):
        check_inputs(config)
