"""The Dockerfiles' own commands, run on exactly the files that each has copied when it comes to them. No engine is needed."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

from tests.flows.test_docker import DOCKERFILES, PROJECT, instructions
from tests.support.paths import ROOT

EXTRAS = {"orchestrator": ["server"], "gpu-worker": ["train", "gpu"]}
OWN = re.compile(
    r"pip|python3? -c"
)  # commands that work on alignflow's files; others make the system round them
# Installs no library: notes what it was asked for, and builds the wheel of a folder with what the folder holds.
PIP = """#!{python}
import subprocess, sys
from pathlib import Path
words = iter(sys.argv[1:])
assert next(words) == "install"
asked, wheels = [], Path({wheels!r})
for word in words:
    if word == "--constraint":
        Path(next(words)).read_text()
    elif word == "--requirement":
        asked += Path(next(words)).read_text().splitlines()
    elif word.startswith((".", "/")):
        build = "import setuptools.build_meta as build, sys; print(build.build_wheel(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=word.partition("[")[0], check=True)
wheels.joinpath("requirements.txt").open("a").write("".join(name + chr(10) for name in asked))
"""


def copy(sources: list[str], root: Path, target: Path, allowed: set[str]) -> None:
    """What COPY does: files by their names, a folder by its content. Only what .dockerignore lets through is there."""
    for source in sources:
        paths = [Path(path) for path in allowed if path == source or path.startswith(f"{source}/")]
        assert paths, f"COPY {source}: the builder has no such file"
        base = Path(source) if (root / source).is_dir() else Path(source).parent
        for path in paths:
            if (root / path).is_file():
                place = target / path.relative_to(base)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes((root / path).read_bytes())


def sent(image: str) -> set[str]:
    """The paths that reach the builder."""
    rules = Path(f"{DOCKERFILES[image]}.dockerignore").read_text().splitlines()
    return exclude_paths(
        ROOT, [rule for rule in rules if rule and not rule.startswith("#")], f"docker/{image}.Dockerfile"
    )


def build(image: str, folder: Path) -> tuple[list[str], list[Path]]:
    """Follow a Dockerfile; return the requirements that it installs, and the wheels of alignflow that it builds."""
    wheels, tools, stage, place = folder / "wheels", folder / "bin", Path(), Path("/")
    for made in (wheels, tools):
        made.mkdir()
    (tools / "pip").write_text(PIP.format(python=sys.executable, wheels=str(wheels)))
    (tools / "pip").chmod(0o755)
    for name in ("python", "python3"):
        (tools / name).symlink_to(sys.executable)
    for word, rest in instructions(image):
        here = stage / place.relative_to("/")
        if word == "FROM":
            stage, place = folder / rest.split()[-1], Path("/")
        elif word == "WORKDIR":
            place = Path(rest)
            (stage / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY" and not rest.startswith("--from="):
            *sources, target = rest.split()
            copy(sources, ROOT, here / target, sent(image))
        elif (
            word == "COPY" and (other := folder / rest.split()[0].removeprefix("--from=")) != folder / "build"
        ):
            source = rest.split()[1].lstrip("/")
            copy([source], other, here / rest.split()[-1], {source})
        elif word == "RUN" and OWN.match(rest):
            path = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
            done = subprocess.run(
                ["sh", "-c", rest], cwd=here, env=path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"RUN {rest}\n{done.stdout}{done.stderr}"
    return (wheels / "requirements.txt").read_text().splitlines(), sorted(wheels.glob("*.whl"))


@pytest.mark.parametrize("image", DOCKERFILES)
def test_an_image_builds_from_what_has_been_copied_and_its_wheel_is_whole(image: str, tmp_path: Path) -> None:
    requirements, (wheel,) = build(image, tmp_path)
    extras = [name for extra in EXTRAS[image] for name in PROJECT["optional-dependencies"][extra]]
    assert requirements == [*PROJECT["dependencies"], *extras]
    files = {
        name.partition(".data/data/share/alignflow/")[2] or name for name in zipfile.ZipFile(wheel).namelist()
    }
    code = {
        str(path.relative_to(ROOT)) for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py")
    }
    pages = {
        str(path.relative_to(ROOT))
        for suffix in ("j2", "css")
        for path in (ROOT / "tasks").rglob(f"*.{suffix}")
    }
    data = {name for globs in DATA.values() for pattern in globs for name in given(pattern)}
    assert code | pages | data <= files


DATA: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "data-files"
]


def given(pattern: str) -> set[str]:
    """Where the files of a pattern lie below share/alignflow."""
    return {str(path.relative_to(ROOT / "deployments")) for path in ROOT.glob(pattern)}


@pytest.mark.parametrize("image", DOCKERFILES)
def test_the_layer_with_the_libraries_depends_on_their_names_alone(image: str) -> None:
    """Whatever is copied before they are installed makes them be installed anew when it changes."""
    before: list[str] = []
    for word, rest in instructions(image):
        if word == "FROM":
            before = []
        if word == "COPY":
            before += rest.split()[:-1]
        if word == "RUN" and "--requirement" in rest:
            break
    assert before == ["--from=requirements", "/src/requirements.txt", "constraints.txt"]
