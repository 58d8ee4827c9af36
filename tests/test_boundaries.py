"""Test the import law: read every file's imports, and import each side in a fresh interpreter.

The law is the order of the folders in docs/architecture.md; no file is listed by hand.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tasks.artifacts.code_version import source_digests
from tests.support.paths import ROOT

HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
ABOVE = {"prefect", "mlflow"}

# From the top layer down: a file imports from its own folder and from folders on lower layers of its side.
ORCHESTRATION = [
    "flows",
    "tasks.rounds",
    "tasks.stages",
    "tasks.execution",
    "tasks.promotion",
    "tasks.tracking",
    "tasks.artifacts",
    "tasks.config",
    "tasks.system",
]
PROGRAMS = [
    "tasks.programs",
    "tasks.reporting",
    "tasks.judges",
    "tasks.demo_site",
    "tasks.rlhf",
    "tasks.dataset",
    "tasks.system",
]
SUBFOLDERS = {  # inside a folder, from the top floor down
    "flows": [
        "flows", "flows.commands", "flows.commands.registry", "flows.commands.labelling",
        "flows.commands.usage", "flows.labelling", "flows.services", "flows.display",
    ],
    # but the commands call the flows
    "tasks.config": ["tasks.config.commands", "tasks.config", "tasks.config.sections"],
    "tasks.programs": [
        "tasks.programs", "tasks.programs.rounds", "tasks.programs.comparison", "tasks.programs.usage",
        "tasks.programs.data_stage", "tasks.programs.ppo_stage", "tasks.programs.token_tables",
        "tasks.programs.runtime",
    ],
    "tasks.rlhf": [
        "tasks.rlhf.training", "tasks.rlhf.judging", "tasks.rlhf.evaluation", "tasks.rlhf.models",
        "tasks.rlhf.batches", "tasks.rlhf.algorithms", "tasks.rlhf.compute",
        "tasks.rlhf",
    ],
    "tasks.dataset": [
        "tasks.dataset.sources", "tasks.dataset.curation", "tasks.dataset.readers", "tasks.dataset",
    ],
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Return every module of the project with its file."""
    files = [path for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py")]
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
        for path in files
    }


MODULES = modules()


@cache
def imports(module: str) -> frozenset[str]:
    """Return every module that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names |= {
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}" in MODULES
                else str(node.module)
                for alias in node.names
            }
    return frozenset(names)


def top(module: str) -> str:
    """Return the folder on the second level that a module lies in: tasks.rlhf for tasks.rlhf.models.lora;
    flows for flows.*.
    """
    return "flows" if module.partition(".")[0] == "flows" else ".".join(module.split(".")[:2])


def folder(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def below(name: str, floors: list[str]) -> set[str]:
    return set(floors[floors.index(name) :])


def may_import(module: str) -> set[str]:
    """Return the folders on the second level that a module may import from."""
    here = top(module)
    allowed = below(here, ORCHESTRATION) if here in ORCHESTRATION else below(here, PROGRAMS)
    return allowed | ({"tasks.config"} if here == "tasks.programs" else set())


def test_every_folder_stands_on_a_floor() -> None:
    assert {top(module) for module in MODULES if module != "tasks"} == {*ORCHESTRATION, *PROGRAMS}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_what_stands_below(module: str) -> None:
    own = {name for name in imports(module) if name in MODULES and name != "tasks"}
    wrong = {name for name in own if top(name) not in may_import(module)}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [module for module in sorted(MODULES) if top(module) in SUBFOLDERS])
def test_a_file_imports_only_what_stands_below_in_its_own_folder(module: str) -> None:
    floors = SUBFOLDERS[top(module)]
    own = {name for name in imports(module) if name in MODULES and top(name) == top(module)}
    is_command = folder(module).startswith("flows.commands")
    allowed = below(folder(module), floors) | ({"flows"} if is_command else set())
    wrong = {name for name in own if folder(name) not in allowed}
    assert folder(module) == "flows" or "flows.cli" not in own
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_no_library_of_the_other_side(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imports(module)}
    assert not libraries & (HEAVY if top(module) in ORCHESTRATION else ABOVE)
    if top(module) == "tasks.system":
        assert libraries <= {*sys.stdlib_module_names, "tasks"}
    if top(module) == "tasks.config":
        assert libraries <= {*sys.stdlib_module_names, "tasks", "pydantic", "publicsuffixlist"}
    if "pydantic" in libraries:
        assert top(module) in ("flows", "tasks.config", "tasks.programs")


def test_only_two_files_import_mlflow() -> None:
    assert [
        module for module in MODULES if any(name.partition(".")[0] == "mlflow" for name in imports(module))
    ] == ["tasks.tracking.client", "tasks.tracking.entities"]


def loaded(names: list[str]) -> set[str]:
    """Return what is in memory after importing modules in a fresh interpreter: top-level packages and our
    modules.
    """
    code = f"import sys\nfor name in {names!r}:\n    __import__(name)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    return {name.partition(".")[0] for name in found} | {name for name in found if name in MODULES}


def of(*folders: str) -> list[str]:
    names = [module for module in sorted(MODULES) if top(module) in folders]
    assert names
    return names


def test_orchestration_never_loads_torch_or_a_program() -> None:
    found = loaded(of(*ORCHESTRATION))
    assert not found & HEAVY
    assert not {
        name for name in found if name in MODULES and name != "tasks" and top(name) not in ORCHESTRATION
    }


def test_programs_never_load_the_orchestrator_or_the_tracker() -> None:
    found = loaded(of(*PROGRAMS))
    assert not found & ABOVE
    assert not {
        name
        for name in found
        if name in MODULES and name != "tasks" and top(name) not in [*PROGRAMS, "tasks.config"]
    }


def test_the_command_line_starts_without_prefect_mlflow_and_torch() -> None:
    found = loaded(
        [
            "flows.cli",
            "flows.preflight",
            "flows.profiles",
            "flows.services.processes",
            "flows.services.environment",
        ]
    )
    assert not found & (HEAVY | ABOVE)


def test_programs_that_only_read_a_tokenizer_load_no_adapters_and_quantisation() -> None:
    """transformers itself loads torch; peft and bitsandbytes take longer than both."""
    found = loaded(["tasks.programs.usage.look", "tasks.programs.runtime.tokenizer_check"])
    assert not found & (HEAVY - {"torch", "transformers"})


def test_the_config_needs_pydantic_only() -> None:
    assert not loaded(of("tasks.config")) & (HEAVY | ABOVE | {"numpy", "pyarrow", "yaml", "rich"})


def test_the_mathematics_need_no_config() -> None:
    assert not {
        name
        for name in loaded(of("tasks.rlhf"))
        if name in MODULES and name != "tasks" and top(name) not in ("tasks.rlhf", "tasks.system")
    }


def of_a_stage(folder: str) -> set[str]:
    """Return the stages with a program, in the folder itself or in its subfolder of the rounds' programs."""
    of_rounds = (
        path for path in (ROOT / folder / "rounds").glob("*.py") if "\n    main(" in path.read_text()
    )
    return {path.stem for path in [*(ROOT / folder).glob("*.py"), *of_rounds]} - {"__init__"}


def test_every_stage_has_a_task_and_a_program_of_the_same_name() -> None:
    tasks = {
        path.stem for path in (ROOT / "tasks" / "stages").rglob("*.py") if "\n@stage(" in path.read_text()
    }
    assert tasks == of_a_stage("tasks/programs")


EVALUATION = {
    "site",
    "winrate",
    "compare",
    "comparisons",
    "ppo",
}  # PPO's independent score watches it on other questions


@pytest.mark.parametrize("stage", sorted(of_a_stage("tasks/programs") - EVALUATION))
def test_no_training_stage_can_see_the_gold_scorer(stage: str) -> None:
    assert not [path for path in source_digests(stage) if "gold" in Path(path).stem]


def test_ppo_sees_the_gold_scorer_in_its_independent_score_alone() -> None:
    gold = {name for name in MODULES if "gold" in name}
    of_ppo = [path.removesuffix(".py").replace("/", ".") for path in source_digests("ppo")]
    seeing = [name for name in of_ppo if name in MODULES and imports(name) & gold]
    assert seeing == ["tasks.programs.ppo_stage.independent_score"]


def test_no_folder_is_overfull() -> None:
    files = [path for folder in ("flows", "tasks", "tests") for path in (ROOT / folder).rglob("*.py")]
    folders = [path.parent for path in files if path.name != "__init__.py"]
    counts = {name.relative_to(ROOT).as_posix(): folders.count(name) for name in set(folders)}
    assert {name: count for name, count in counts.items() if count > 15} == {}
