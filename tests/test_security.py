"""Test what must not be possible: running code from data, a shell, a pickle, or a foreign program."""

import ast
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import get_current_settings
from safetensors import SafetensorError

from flows.services import environment
from tasks.artifacts.base_model import check_model_folder
from tasks.rlhf.models import loading, lora
from tasks.rlhf.training import checkpoints
from tasks.stages.stage import TASK_OPTIONS
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.paths import ROOT

SOURCES = sorted(path for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py"))
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
BANNED_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "__import__",
}


def calls(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def keywords(tree: ast.AST) -> set[str]:
    return {
        f"{keyword.arg}={ast.unparse(keyword.value)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_reads_pickles_starts_a_shell_or_runs_text(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {
        (node.module or "").partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    }
    assert not imported & UNSAFE
    assert not calls(tree) & BANNED_CALLS
    assert not keywords(tree) & {
        "shell=True",
        "trust_remote_code=True",
        "weights_only=False",
        "allow_pickle=True",
    }


def test_no_setting_of_containers_or_deployments_allows_what_the_code_does_not() -> None:
    files = [
        path for folder in ("deployments", "docker") for path in (ROOT / folder).rglob("*") if path.is_file()
    ]
    assert files
    for path in files:
        assert not re.search(
            r"pickle|trust_remote_code|privileged: *true",
            path.read_text().replace("MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false", ""),
        )


def test_results_of_flows_are_json_and_mlflow_reads_no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TASK_OPTIONS["result_serializer"] == "json"
    assert environment.FIXED["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    monkeypatch.setenv(
        "PREFECT_RESULTS_DEFAULT_SERIALIZER", environment.FIXED["PREFECT_RESULTS_DEFAULT_SERIALIZER"]
    )
    assert get_current_settings().__class__().results.default_serializer == "json"


class Planted:
    """A pickle that creates a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def planted(tmp_path: Path) -> tuple[bytes, Path]:
    mark = tmp_path / "executed"
    content = pickle.dumps(Planted(mark))
    pickle.loads(content)
    assert mark.exists(), "the planted pickle would not have been noticed"
    mark.rmdir()
    return content, mark


def test_a_pickle_planted_as_a_models_weights_is_refused(planted: tuple[bytes, Path], tmp_path: Path) -> None:
    content, mark = planted
    folder = tiny.base_folder(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="other formats are not loaded"):
        check_model_folder(folder)
    with pytest.raises(InputError, match="safetensors"):
        loading.load(folder, device=tiny.CPU)
    assert not mark.exists()


def test_a_pickle_planted_beside_a_models_weights_is_not_read(
    planted: tuple[bytes, Path], tmp_path: Path
) -> None:
    content, mark = planted
    folder = tiny.base_folder(tmp_path / "base")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(content)
    loading.load(folder, device=tiny.CPU)
    loading.load_tokenizer(folder)
    assert not mark.exists()


def test_a_pickle_planted_as_an_adapter_or_a_checkpoint_is_not_read(
    planted: tuple[bytes, Path], tmp_path: Path
) -> None:
    content, mark = planted
    adapter, step = tmp_path / "adapter", tmp_path / "checkpoints" / "step-00000001"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]})
    )
    (adapter / "adapter_model.bin").write_bytes(content)
    with pytest.raises((OSError, SafetensorError)):
        lora.load(tiny.model(), "policy", adapter)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError):
        lora.load(tiny.model(), "policy", adapter)
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"step": 1, "state": {}}')
    (step / "tensors.safetensors").write_bytes(content)
    with pytest.raises(SafetensorError):
        checkpoints.latest(step.parent)
    assert not mark.exists()


def test_code_that_a_model_brings_does_not_run(tmp_path: Path) -> None:
    folder, mark = tiny.base_folder(tmp_path / "base"), tmp_path / "executed"
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    loading.load(folder, device=tiny.CPU)  # as the architecture that transformers itself has
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(InputError, match="custom code"):
        loading.load(folder, device=tiny.CPU)
    assert not mark.exists()
