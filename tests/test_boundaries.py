"""The import law: each side imported in a fresh interpreter, and every file's imports read."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.artifacts.code_version import sources_of

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("config", "dumps", "settings", "source", "tuning")
PROGRAMS = sorted(path.stem for path in (ROOT / "tasks" / "programs").glob("*.py") if path.stem != "__init__")
STAGES = sorted({path.stem for path in (ROOT / "tasks").glob("*.py")} & set(PROGRAMS))
MATERIAL = sorted(path.stem for path in (ROOT / "tasks" / "rlhf").glob("*.py") if path.stem != "__init__")
ORCHESTRATION = sorted(f"{folder}.{path.stem}" for folder in ("flows", "tasks") for path in (ROOT / folder).glob("[!_]*.py"))
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
ABOVE = ("prefect", "mlflow")


def loaded(*groups: list[str]) -> list[set[str]]:
    """What is in memory after importing each group in turn in one fresh interpreter: top-level packages, and alignflow's own modules."""
    code = f"import sys\nfor group in {groups!r}:\n    for name in group:\n        __import__(name)\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    return [{name.partition(".")[0] for name in names} | {name for name in names if name.startswith(("tasks.", "flows."))} for names in found]


@pytest.fixture(scope="module")
def below() -> list[set[str]]:
    """What the material loads, and what the programs load on top: torch's import takes seconds, so once for both."""
    return loaded([f"tasks.rlhf.{name}" for name in MATERIAL], [f"tasks.programs.{name}" for name in PROGRAMS])


def test_orchestration_never_loads_torch_or_a_program() -> None:
    (found,) = loaded(ORCHESTRATION)
    assert not found & set(HEAVY)
    programs = {f"tasks.programs.{name}" for name in PROGRAMS} - {f"tasks.programs.{name}" for name in SETTINGS}
    assert not found & programs
    assert {name for name in found if name.startswith("tasks.rlhf.")} <= {"tasks.system.errors"}


def test_the_command_line_starts_without_prefect_mlflow_and_torch() -> None:
    (found,) = loaded(["flows.cli", "flows.preflight", "flows.profiles", "flows.services.processes", "flows.services.environment"])
    assert not found & {*HEAVY, *ABOVE}


def test_programs_never_load_the_orchestrator_or_the_tracker(below: list[set[str]]) -> None:
    found = below[1]
    assert not found & set(ABOVE)
    above = {name for name in found if name.startswith(("tasks.", "flows.")) and not name.startswith(("tasks.programs", "tasks.rlhf"))}
    assert not above


def test_the_config_needs_pydantic_only() -> None:
    (found,) = loaded(["tasks.config.pipeline"])
    assert not found & {*HEAVY, *ABOVE, "numpy", "pyarrow", "yaml", "rich"}


def test_the_material_stands_on_its_own(below: list[set[str]]) -> None:
    found = below[0]
    assert not found & set(ABOVE)
    assert not {name for name in found if name.startswith(("tasks.", "flows.")) and not name.startswith("tasks.rlhf")}
    assert "flows" not in found


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FLOWS = sorted((ROOT / "flows").rglob("*.py"))
TASKS = sorted((ROOT / "tasks").glob("*.py"))
PROGRAM_FILES = sorted((ROOT / "tasks" / "programs").rglob("*.py"))
MATERIAL_FILES = sorted((ROOT / "tasks" / "rlhf").rglob("*.py"))


@pytest.mark.parametrize(
    ("files", "banned"),
    [
        (FLOWS, (*HEAVY, "mlflow", "tasks.rlhf")),
        (TASKS, (*HEAVY, "flows", "tasks.rlhf")),
        (PROGRAM_FILES, (*ABOVE, "flows")),
        (MATERIAL_FILES, (*ABOVE, "flows", "tasks.programs", "pydantic")),
    ],
    ids=["flows", "tasks", "programs", "rlhf"],
)
def test_no_file_imports_what_it_must_not_even_inside_a_function(files: list[Path], banned: tuple[str, ...]) -> None:
    assert files
    for path in files:
        assert not {name for name in imports(path) if any(name == bad or name.startswith(f"{bad}.") for bad in banned)}, named(path)


def test_only_tracking_imports_mlflow() -> None:
    files = [*FLOWS, *TASKS, *PROGRAM_FILES, *MATERIAL_FILES]
    assert [named(path) for path in files if any(name.partition(".")[0] == "mlflow" for name in imports(path))] == ["tasks/tracking/client.py"]


def test_tasks_know_of_programs_only_their_config() -> None:
    for path in [*FLOWS, *TASKS]:
        programs = {name for name in imports(path) if name.startswith("tasks.programs")}
        assert all(name.startswith("tasks.config.pipeline") for name in programs), named(path)


def test_programs_and_material_import_nothing_of_the_tasks_above() -> None:
    for path in [*PROGRAM_FILES, *MATERIAL_FILES]:
        own = {name for name in imports(path) if name.partition(".")[0] == "tasks"}
        assert all(name.startswith(("tasks.programs", "tasks.rlhf")) for name in own), named(path)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("site", "winrate")])
def test_no_training_stage_can_see_the_gold_scorer(stage: str) -> None:
    assert not [path for path in sources_of(stage) if "gold" in Path(path).stem]


def test_every_stage_has_a_task_and_a_program_of_the_same_name() -> None:
    programs = set(PROGRAMS) - {
        *SETTINGS,
        "entry",
        "forkserver",
        "reading",
        "ranges",
        "card",
        "histograms",
        "oddities",
        "crew",
        "call",
        "away",
        "workplace",
        "beginning",
        "probing",
        "attacking",
        "pairs",
        "tokenizer_check",
    }
    assert programs <= {path.stem for path in TASKS}, "a program without a task"
    assert {path.stem for path in TASKS if "@task(" in path.read_text()} == programs
