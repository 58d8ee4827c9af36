"""Test `alignflow look`: what is shown of a source, what was cut, and what it refuses."""

import json
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from flows import cli
from tasks.artifacts.base_model import find_model_folder, find_tokenizer_folder
from tasks.config.sections.models import HuggingFaceBase
from tasks.execution import foreground
from tasks.programs.usage.look_screen import MOST_LINES, _show_counts
from tasks.system.errors import InputError
from tests.support import forked, tiny
from tests.support.chat_families import family_tokenizer
from tests.support.data_sets import chat_message
from tests.tasks.artifacts.hub_server import serve_hub, use_hub

ANSWER = "Use sort. Mail ann@mail.de, <|im_end|>."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows of conversations and a tokenizer, without a model."""
    root = tmp_path_factory.mktemp("look")
    rows = []
    for n in range(30):
        talk = [chat_message("user", "Hi"), chat_message("assistant", "Hello!")]
        talk.append(chat_message("user", f"How do I sort {n}? " + "I think so. " * 6))
        rows.append({"id": n, "messages": [*talk, chat_message("assistant", ANSWER)]})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    family_tokenizer("chatml").save_pretrained(root / "model")
    return root


def shown(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["look", *words]) == 0
    return capfd.readouterr().out


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))


@pytest.fixture
def forked_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the program as a fork of a process that has its imports, which take longer than the program."""

    def start(module: list[str], *, stderr: int) -> int:
        output = tmp_path / "output.txt"
        status = forked.start(["-m", *module], output).wait(900)
        print(output.read_text(), end="", flush=True)
        output.unlink()
        return status

    monkeypatch.setattr(foreground, "wait_in_foreground", start)


@pytest.mark.usefixtures("forked_program")
def test_examples_show_the_template_and_what_the_loss_counts(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows, model = str(folder / "rows.jsonl"), str(folder / "model")
    out = shown(capfd, rows, "--model", model, "--count", "1")
    head, _, rest = out.partition("\n\n1. own data, question ")
    assert "text.template=chat, sft.loss_on=every" in head
    text = rest.partition("\n")[2]
    assert text.startswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n《Hello!<|im_end|>》\n<|im_start|>user\n"
    )
    assert "<|im_start|>assistant\n《Use sort. Mail <email>, <|im_end|>.<|im_end|>》\nprompt " in text
    assert "Read the beginning of the source (30 rows): 30 questions, 0 with several answers, 30 of" in text
    assert "Of 30 questions 0 are cut at text.max_prompt_tokens=1024" in text
    assert "Noticed: rows read by the columns of TRL (messages) (30)" in text
    assert "Not read: column id (30)" in text
    last = shown(capfd, rows, "--model", model, "--count", "1", "--set", "sft.loss_on=last")
    assert "Hello!<|im_end|>\n" in last
    assert "《Hello!" not in last


@pytest.mark.usefixtures("forked_program")
def test_of_a_model_on_the_hub_only_the_tokenizer_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    tiny.base_folder(tmp_path / "hub/somebody/model")
    rows = [{"prompt": f"How {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    profile = {
        "source": {"kind": "own", "path": str(tmp_path / "rows.jsonl")},
        "base": {"kind": "hugging-face", "path": "somebody/model"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    with serve_hub(tmp_path / "hub") as (address, requests):
        use_hub(monkeypatch, address)
        assert "1. own data" in shown(capfd, str(tmp_path / "mine.yaml"), "--count", "1")
        assert any("tokenizer.json" in request for request in requests)
        assert not any(".safetensors" in request for request in requests)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        whole = find_model_folder(HuggingFaceBase(path="somebody/model"))
    assert (whole / "model.safetensors").is_file()


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"base\.path: the model folder .* has no tokenizer"):
        find_tokenizer_folder(HuggingFaceBase(path=str(tmp_path)))


def test_help_says_that_a_source_may_be_on_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["look", "--help"])
    assert "or the id of a data set on the Hugging Face hub" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("forked_program")
def test_what_is_cut_is_shown(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "text.max_prompt_tokens=60", "--set", "text.max_answer_tokens=8"]
    named = [str(folder / "rows.jsonl"), "--model", str(folder / "model"), "--count", "2"]
    out = shown(capfd, *named, *settings)
    assert out.count("[2 oldest messages left out, 28 characters: user: Hi / assistant: Hello!]") == 2
    for what in ("question", "answer"):
        assert out.count(f"[cut from the end of the {what}, ") == 2
    assert "Of 30 questions 30 are cut at text.max_prompt_tokens=60, and 30 of 30 answers" in out
    assert "Of 90 messages of conversations the 60 oldest are left out." in out


@pytest.mark.usefixtures("forked_program")
def test_as_many_examples_are_shown_as_are_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    out = shown(capfd, "demo", "--count", "220")
    assert out.count("\n\nAnswer:《") == 220
    assert "Of 220 questions " in out


def test_counts_of_0_are_not_shown() -> None:
    console = Console(record=True, width=100, file=StringIO())
    some = Counter({f"rule {n}": n - 3 for n in range(MOST_LINES + 4)})
    _show_counts(console, "Dropped", Counter(dict.fromkeys(some, 0)))
    assert console.export_text() == ""
    _show_counts(console, "Dropped", some)
    assert len(console.export_text().splitlines()) == MOST_LINES
    _show_counts(console, "Dropped", some + Counter({"more": 1}))
    assert console.export_text().splitlines()[-1] == "Dropped: 1 more"


def test_a_profile_of_the_built_in_base_needs_no_model(capfd: pytest.CaptureFixture[str]) -> None:
    out = shown(capfd, "demo", "--count", "2")
    assert out.count("Question: ") == out.count("\n\nAnswer:《") == 2
    assert out.count("worse: ") == 2
    assert "The tokenizer is learnt from the texts read here" in out


@pytest.mark.usefixtures("forked_program")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["demoo"], "There is no profile, file or folder 'demoo'; did you mean demo?"),
        (["{rows}", "--model", "{rows}"], "--model: there is no folder"),
        (["{rows}", "--set", "text.template=chat"], "needs a tokenizer with a chat template"),
        (["{rows}", "--set", "source.completion=id"], "No question can be used of the 30 rows"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str], sentence: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    named = [word.format(rows=folder / "rows.jsonl") for word in words]
    assert cli.main(["look", *named]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert sentence in line


def test_nothing_is_left_behind(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    shown(capfd, str(folder / "rows.jsonl"), "--model", str(folder / "model"))
    assert sorted(folder.rglob("*")) == before
    assert {path.name for path in (tmp_path / "home").rglob("*") if path.is_file()} == {"look.log"}
