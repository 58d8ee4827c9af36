"""Test that a tokenizer or a template that no stage could use is refused before anything runs."""

import subprocess
from pathlib import Path

import pytest

from flows import cli
from flows.preflight import check_inputs
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import HuggingFaceBase, Text
from tasks.execution import tokenizer_preflight
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.chat_families import CHATML

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base_folder(tmp_path_factory.mktemp("model"))


def with_template(base: Path, folder: Path, template: str | None) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).symlink_to(file)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template: use text.template=question-answer$"),
        (
            (
                "{% if messages[0].role != 'system' %}{{ raise_exception('A system message is needed') "
                "}}{% endif %}"
            ),
            r"\(A system message is needed\)",
        ),
        ("{{ messages[0].content }}{% endfor %}", "fails on a question"),
    ],
)
def test_a_template_that_fails_is_found_before_the_data_stage(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, sentence: str
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    folder = with_template(base, tmp_path / "model", template)
    with pytest.raises(InputError, match=sentence) as refusal:
        check_inputs(Pipeline(base=HuggingFaceBase(path=str(folder)), text=Text(template="chat")))
    assert "\n" not in str(refusal.value)


def test_what_passed_is_not_looked_at_again_until_it_changes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    calls: list[list[str]] = []
    honest = tokenizer_preflight.subprocess.run

    def counted(command: list[str], **how: object) -> object:
        calls.append(command)
        return honest(command, **how)  # type: ignore[call-overload]

    monkeypatch.setattr(tokenizer_preflight.subprocess, "run", counted)
    good = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    folder = with_template(base, tmp_path / "model", good)
    for _ in range(2):
        tokenizer_preflight.check_tokenizer(folder, Text(template="chat"))
    assert len(calls) == 1
    (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    with pytest.raises(InputError, match="division by zero"):
        tokenizer_preflight.check_tokenizer(folder, Text(template="chat"))
    assert len(calls) == 2


def test_a_template_that_fills_the_prompt_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    folder = with_template(
        base,
        tmp_path / "model",
        "You are a helpful, honest and harmless assistant of this site. " * 4 + CHATML,
    )
    with pytest.raises(InputError, match=r"text\.max_prompt_tokens=48 leaves no room for a question"):
        tokenizer_preflight.check_tokenizer(folder, Text(template="chat"))


@pytest.mark.parametrize(("command", "status"), [("plan", 0), ("run", 2)])
def test_a_home_that_cannot_be_written_to_is_told_by_the_command_that_needs_one(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    status: int,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(
        tokenizer_preflight.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", "")
    )
    assert (
        cli.main([command, "demo", "--set", "base.kind=hugging-face", "--set", f"base.path={base}"]) == status
    )
    assert capsys.readouterr().err == (
        ""
        if status == 0
        else f"alignflow: {tmp_path / 'file'} cannot be written to; ALIGNFLOW_HOME names another place\n"
    )
