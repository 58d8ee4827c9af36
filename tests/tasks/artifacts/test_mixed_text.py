"""Test the text of the user's that PPO mixes in: its place in the key, and what is refused early."""

import os
from pathlib import Path

import pytest

from flows.preflight import check_inputs
from flows.profiles import load, with_absolute_paths
from tasks.artifacts.mixed_text import mixed_text
from tasks.system.errors import InputError


def test_the_text_is_an_input_known_by_its_content(tmp_path: Path) -> None:
    digests = []
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f'{{"text": "{text}"}}\n')
        config = load("demo", [f"ppo.ptx.path={path}", "ppo.ptx.weight=0.1"])
        digests.append(mixed_text(config)["text"]["digest"])
    assert digests[0] == digests[1] != digests[2]
    assert mixed_text(load("demo", [])) == {}


def test_a_missing_file_is_refused_before_anything_runs() -> None:
    with pytest.raises(InputError, match=r"^ppo\.ptx\.path: there is no file .*none\.jsonl$"):
        check_inputs(load("demo", ["ppo.ptx.path=none.jsonl", "ppo.ptx.weight=0.1"]))


def test_a_relative_path_is_made_absolute(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    config = load("demo", ["ppo.ptx.path=text.jsonl", "ppo.ptx.weight=0.1"])
    assert with_absolute_paths(config, tmp_path).ppo.ptx.path == os.path.join(tmp_path, "text.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("text.txt", "one", r"text\.txt must end in \.jsonl"),
        ("text.jsonl", '{"body": "one"}\n', r"row 1 of text\.jsonl is no JSON object with a column text"),
        ("text.jsonl", "{", r"row 1 of text\.jsonl is no JSON"),
    ],
)
def test_another_format_is_refused_before_anything_runs(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=sentence):
        check_inputs(load("demo", [f"ppo.ptx.path={tmp_path / name}", "ppo.ptx.weight=0.1"]))
