"""README and docs: sizes, links, paths, commands, settings and metrics that they name."""

import argparse
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel

from flows import cli
from tasks.config.pipeline import Pipeline
from tasks.reporting.stage_panels import FACTS, PANELS
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NAMES = (
    "quickstart data rounds architecture design metrics results operations security limitations contributing"
).split()
FOLDERS = ("flows/", "tasks/", "tests/", "deployments/", "docker/", "docs/", ".ci/")
COMMAND = re.compile(r"`alignflow ([\w-]+)")
SETTING = re.compile(r"^([a-z]+)\.([a-z_.]+?)(?:=.*)?$")
METRIC_PAGES = {"metrics.md", "results.md"}  # where sft.NAME is a figure of the stage, not a setting


def tokens(page: Path) -> Iterator[Token]:
    """Yield the inline tokens of a page: its links, pictures and code spans."""
    for block in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield from block.children or []


def code_spans(page: Path) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "code_inline"]


def links(page: Path) -> list[str]:
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens(page)]
    return [str(target) for target in found if target]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_readme_is_read_in_ten_minutes() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.encode()) <= 8192
    lines = text.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))] == []


def test_the_docs_are_the_pages_that_are_planned() -> None:
    assert sorted(page.stem for page in DOCS.glob("*.md")) == sorted(NAMES)
    linked = {ROOT / target for target in links(README)}
    assert {DOCS / f"{name}.md" for name in NAMES} <= linked


@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_with_one_sentence_that_says_what_it_answers(name: str) -> None:
    title, empty, sentence, *_ = (DOCS / f"{name}.md").read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert empty == ""
    assert sentence.startswith("This page answers ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_wrapped(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 110 and not line.startswith(("|", "!["))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    targets = [target for target in links(page) if not target.startswith(("http:", "https:"))]
    assert targets or page.parent == DOCS or page.name == "CHANGELOG.md"
    for target in targets:
        path, _, anchor = unquote(target).partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_code_exists(page: Path) -> None:
    for span in code_spans(page):
        if span.startswith(FOLDERS) and "NAME" not in span and " " not in span:
            assert (ROOT / span).exists(), span


def test_pages_name_paths_in_code() -> None:
    """Check that the test above recognises paths at all."""
    named = {span for page in PAGES for span in code_spans(page) if span.startswith(FOLDERS)}
    assert len(named) > 50


def test_every_name_that_a_page_places_in_a_file_is_there() -> None:
    found = 0
    for page in PAGES:
        for name, path in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (
                page.name,
                name,
                path,
            )
            found += 1
    assert found >= 8


def test_every_path_of_the_readmes_tree_exists() -> None:
    section = README.read_text(encoding="utf-8").split("## The folders")[1]
    tree = next(block for block in section.split("\n\n") if block.startswith("    "))
    stack: list[str] = []
    found = 0
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        for name in line.split() if line.count("/  ") > 1 else line.split()[:1]:
            stack = [*stack[:depth], name]
            assert (ROOT / "".join(stack)).exists(), "".join(stack)
            found += 1
    assert found > 20


def commands() -> set[str]:
    """Return the subcommands of the command line."""
    (action,) = (
        action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return set(action.choices)


def test_the_command_table_names_the_commands_of_the_command_line() -> None:
    table = README.read_text(encoding="utf-8").split("## Commands")[1].split("##")[0]
    assert re.findall(r"^\| `alignflow ([\w-]+)", table, re.MULTILINE) == list(
        dict.fromkeys(COMMAND.findall(table))
    )
    assert set(COMMAND.findall(table)) == commands()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*COMMAND.findall(text), *re.findall(r"^    alignflow (\w+)", text, re.MULTILINE)}
    assert named <= commands()


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings, those of every kind of a section included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in models_in(field.annotation):
            yield from settings(kind, f"{prefix}{name}.")


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from models_in(inner)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in METRIC_PAGES], ids=lambda page: page.name
)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    known, sections = set(settings(Pipeline)), set(Pipeline.model_fields)
    text = page.read_text(encoding="utf-8")
    named = [*code_spans(page), *re.findall(r"--set (\S+)", text)]
    for match in filter(None, map(SETTING.match, named)):
        section, rest = match.groups()
        if (
            section in sections
            and not re.search(r"\.(json|jsonl|parquet|py)$", rest)
            and f"{section}.{rest}" != "a.b"
        ):
            assert f"{section}.{rest}" in known, match[0]


def test_every_metric_of_the_report_is_explained() -> None:
    explained = set(code_spans(DOCS / "metrics.md"))
    drawn = {name for panels in PANELS.values() for panel in panels for name in panel.metrics}
    told = {
        name for name in FACTS if not name.endswith(("prompts_cut", "answers_cut", "pairs_equal_once_cut"))
    }
    assert drawn
    assert told
    assert sorted((drawn | told) - explained) == []


def test_the_picture_of_the_readme_is_small_and_wide_enough() -> None:
    (picture,) = (ROOT / target for target in links(README) if target.endswith(".png"))
    assert picture.stat().st_size < 200_000
    header = picture.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20]) >= 1000  # pixels wide


def test_the_project_says_its_licence_and_where_its_pages_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert [(ROOT / file).is_file() for file in project["license-files"]] == [True]
    assert {"Documentation", "Changelog", "Source"} <= project["urls"].keys()
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
