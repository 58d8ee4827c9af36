"""Test the command line: bad input first, then whole runs with fake programs."""

import json
import os
import re
import shutil
import signal
import sqlite3
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from flows import cli, extras, profiles
from flows.display.formatting import format_metric
from flows.display.run_summary import stage_table
from flows.preflight import check_places
from flows.profiles import load
from tasks.artifacts.store import SCHEMA
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError, StageFailed
from tests.support import fake_programs

SHOWN_FILES = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}


@pytest.fixture(autouse=True)
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(place / "home"))
    return place


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what the command prints on stderr when it ends with status 2."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    out, error = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert error.startswith("alignflow")
    assert error.count("\n") == 1
    return error.partition(": ")[2].strip()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "dmo"], "There is no profile 'dmo'; did you mean demo?"),
        (["plan", "xyz"], "There is no profile 'xyz'; there are: demo"),
        (["run", "mine.yaml"], "There is no profile file mine.yaml"),
        (
            ["run", "demo", "--set", "ppo.kl_coeficient=0.1"],
            "There is no setting ppo.kl_coeficient; did you mean ppo.kl_coefficient?",
        ),
        (
            ["plan", "demo", "--set", "kl_coefficient=0.1"],
            "There is no setting kl_coefficient; did you mean ppo.kl_coefficient?",
        ),
        (
            ["run", "demo", "--set", "sft.lora.rnk=4"],
            "There is no setting sft.lora.rnk; did you mean sft.lora.rank?",
        ),
        (
            ["run", "demo", "--set", "ppo.kl_coefficient=-1"],
            "ppo.kl_coefficient must be greater than or equal to 0, got -1",
        ),
        (["run", "demo", "--set", "ppo.clip_range=nan"], "ppo.clip_range must be a finite number, got nan"),
        (["run", "demo", "--set", "method=rlhf"], "method must be 'ppo', 'dpo' or 'both', got 'rlhf'"),
        (
            ["run", "demo", "--set", "ppo=3"],
            "ppo is a section with settings of its own, not a value; got '3'",
        ),
        (
            ["run", "demo", "--set", "source.kind=reddit"],
            "source.kind must be 'shell-site' or 'stack-exchange' or",
        ),
        (
            ["run", "demo", "--set", "source={kind: stack-exchange, pth: x}"],
            "There is no setting source.pth; did you mean source.path?",
        ),
        (
            ["run", "demo", "--set", "data.rl_share=0.9"],
            "data: finetune_share + reward_share + rl_share must stay below 1",
        ),
        (
            ["run", "demo", "--set", "sft.loss_on=answer"],
            "sft.loss_on: 'answer' is a value of base.loss_on; write 'last' to count a conversation's last "
            "answer, or 'every'",
        ),
        (
            ["run", "demo", "--set", "base.loss_on=last"],
            "base.loss_on: 'last' is a value of sft.loss_on; write 'answer'",
        ),
        (["run", "demo", "--set", "base.num_heads=3"], "base: num_heads must divide hidden_size"),
        (["run", "demo", "--set", "sft.lora.targets=5"], "sft.lora.targets must be 'all-linear', got '5'"),
        (
            ["run", "demo", "--set", "data.languages=en"],
            "data.languages must be a list, such as [a, b], got 'en'",
        ),
        (["run", "demo", "--set", "seed"], "--set takes NAME=VALUE"),
        (["run", "demo", "--set", "sft.start=gone"], "sft.start: there is no file or folder gone"),
        (["run", "demo", "--set", "ppo.start=gone"], "ppo.start: there is no file or folder gone"),
        (["run", "demo", "--set", "dpo.start=."], "dpo.start: . holds no weights in safetensors format"),
        (
            ["run", "demo", "--set", "sft.tune=full", "--set", "weights.base=nf4"],
            "sft.tune=full trains every weight, which weights.base=nf4 does not",
        ),
        (
            ["run", "demo", "--set", "reward.members=2", "--set", "reward.tune=full"],
            "reward: members of an ensemble share a base",
        ),
        (
            ["run", "demo", "--set", "reward={members: 2, start: x}"],
            "reward: members of an ensemble that all start from the same weights",
        ),
        (
            ["run", "demo", "--set", "machine.launch.dpo.shard=true", "--set", "dpo.tune=bottleneck"],
            "machine.launch.dpo.shard is for dpo.tune=full or lora",
        ),
        (
            [
                "run",
                "demo",
                "--set",
                "machine.launch.ppo.shard=true",
                "--set",
                "ppo.sampler=continuous_batching",
            ],
            "machine.launch.ppo.shard: ppo.sampler=continuous_batching needs all weights of the base",
        ),
        (
            [
                "run",
                "demo",
                "--set",
                "dpo={tune: bottleneck, bottleneck: {whole_layers: true}}",
                "--set",
                "merge.dtype=bfloat16",
            ],
            "dpo.bottleneck.whole",
        ),
        (
            ["run", "demo", "--set", "dpo={loss: ipo, label_smoothing: 0.1}"],
            "dpo: label_smoothing belongs to the sigmoid loss",
        ),
        (["run", "demo", "--set", "data.languages=[1"], "--set data.languages: '[1' is not a value"),
        (
            ["run", "demo", "--set", "source={kind: stack-exchange, path: gone.xml}"],
            "source.path: there is no file or folder gone.xml",
        ),
        (
            ["run", "demo", "--set", "source={kind: stack-exchange, path: .}"],
            "source.path: . holds no file whose name ends in .7z",
        ),
        (
            ["run", "demo", "--set", "base={kind: hugging-face, path: ./gone}"],
            "base.path: there is no model folder gone",
        ),
        (
            ["run", "demo", "--summary", "gone/s.json"],
            "--summary: gone/s.json cannot be written; its folder must exist",
        ),
        (["run", "demo", "--summary", "."], "--summary: . cannot be written"),
        (["up", "dmo"], "There is no profile 'dmo'; did you mean demo?"),
        (
            ["up", "--prefect-port", "70000"],
            "argument --prefect-port: 70000 must be 0 or more, 65535 at most",
        ),
        (["up", "--mlflow-port", "x"], "argument --mlflow-port: invalid number value: 'x'"),
        (
            ["up", "--prefect-port", "4321", "--mlflow-port", "4321"],
            "--prefect-port and --mlflow-port are both 4321",
        ),
        (["deploy", "gone.yaml"], "There is no profile file gone.yaml"),
        (["work", "gpu", "--limit", "-1"], "argument --limit: -1 must be 0 or more"),
        (["gc", "--keep-runs", "-3"], "argument --keep-runs: -3 must be 0 or more"),
        (["gc", "--days", "nan"], "argument --days: nan must be 0 or more"),
        (["landed", "demo", "gone.xml"], "There is no file or folder gone.xml"),
        (["rnu", "demo"], "argument COMMAND: invalid choice: 'rnu'"),
        (["run"], "the following arguments are required: PROFILE"),
        (["report"], "There is no report yet; `alignflow run demo` makes one"),
        (["job", "demo", "sft", "work"], "The stage sft takes the result of data, pretrain, not built yet"),
        (["job", "demo", "stf", "work"], "This profile has no stage stf; it has: site, data,"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    capsys, empty_place: Path, arguments: list[str], sentence: str
) -> None:
    assert refused(capsys, *arguments).startswith(sentence)
    assert list(empty_place.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ppo: {steps: 0}", "ppo.steps must be greater than or equal to 1, got 0"),
        ("pop: {steps: 1}", "There is no setting pop; did you mean ppo?"),
        ("ppo:\n  steps: 1\n bad", "mine.yaml is not valid YAML: line 3"),
        ("- ppo", "mine.yaml must hold settings such as"),
        ("\x00", "mine.yaml is not valid YAML"),
        ("seed: 1\nppo: {steps: 1}\nseed: 2", "mine.yaml is not valid YAML: line 3, seed is there twice"),
        ("source:\n  kind: own\n  path:", "source.path must be a valid string, got null"),
    ],
)
def test_a_bad_profile_is_one_sentence(capsys, empty_place: Path, text: str, sentence: str) -> None:
    Path("mine.yaml").write_text(text)
    assert refused(capsys, "run", "mine.yaml").startswith(sentence)
    assert [path.name for path in empty_place.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "base.path: the model folder model has no config.json"),
        ("model.safetensors", "base.path: the model folder model has no .safetensors weights"),
        ("tokenizer.json", "base.path: the model folder model has no tokenizer"),
    ],
)
def test_an_incomplete_model_folder_is_refused_before_anything_runs(
    capsys, empty_place: Path, missing: str, sentence: str
) -> None:
    Path("model").mkdir()
    for name in SHOWN_FILES.keys() - {missing}:
        Path("model", name).write_text(SHOWN_FILES[name])
    assert refused(capsys, "run", "demo", "--set", "base={kind: hugging-face, path: model}").startswith(
        sentence
    )
    assert [path.name for path in empty_place.iterdir()] == ["model"]


def test_a_nearly_full_disk_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10 * 2**20

    monkeypatch.setattr("flows.preflight.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(InputError, match="is nearly full: 10 MB are free"):
        check_places(tmp_path / "home", None)


def test_a_full_disk_in_mid_run_is_bad_input_not_a_crash(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiles, "load", full)
    assert refused(capsys, "run", "demo").startswith("The disk under")


def test_a_failed_stage_is_one_sentence(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StageFailed("The stage ppo failed: CUDA went away. Its log: /x/log.txt")

    monkeypatch.setattr(profiles, "load", fail)
    assert cli.main(["run", "demo"]) == 1
    assert capsys.readouterr().err == "alignflow: The stage ppo failed: CUDA went away. Its log: /x/log.txt\n"


def test_what_nobody_foresaw_is_one_line_and_its_traceback_in_a_file(
    capsys, empty_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "load", lambda *_: 1 / 0)
    assert cli.main(["run", "demo"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ZeroDivisionError" in (empty_place / "home" / "logs" / "alignflow.log").read_text()


TEXTS = (
    *(
        "/x/data #2.jsonl",
        "2024-01-01",
        "null",
        "@x",
        "yes",
        "no",
        "1e3",
        "0x10",
        "010",
        "a: b",
        "[x",
        "{x",
        "~",
        "1:30",
        "3",
        "1_0",
    ),
    *("*x", "&x", "!x", "'x'", "%x", " x ", "- x", "|", "`x`"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_takes_the_text_as_it_was_typed(text: str) -> None:
    own = load(
        "demo", ["source.kind=own", f"source.path={text}", f"source.site={text}", f"source.completion={text}"]
    ).source
    assert (own.path, own.site, own.completion) == (text, text, text)
    found = load(
        "demo",
        ["base.kind=hugging-face", f"base.path={text}", f"base.revision={text}", f"machine.dask={text}"],
    )
    assert (found.base.path, found.machine.dask) == (text, text)
    assert found.base.revision == (
        None if text == "null" else text
    )  # a setting that may be null takes that one word


@pytest.mark.parametrize(
    "text",
    [text for text in TEXTS if text[:1] not in "~*&!'%@{[-|` " and "#" not in text and ":" not in text],
)
def test_a_text_in_a_profile_is_no_date_number_or_truth(text: str) -> None:
    Path("mine.yaml").write_text(
        f"source:\n  kind: own\n  path: {text}\n  revision: {text}\n"
        if text != "null"
        else "source: {kind: own, path: 'null'}"
    )
    own = load("mine.yaml", []).source
    assert own.path == text
    assert own.revision == (None if text == "null" else text)


def test_lists_of_a_setting_hold_texts_as_well() -> None:
    assert load(
        "demo", ["data.languages=[no, en]", "data.decontaminate_against=[2024-01-01, '/x #2', 010]"]
    ).data.languages == ("no", "en")
    assert load(
        "demo", ["data.decontaminate_against=[2024-01-01, '/x #2', 010]"]
    ).data.decontaminate_against == (
        "2024-01-01",
        "/x #2",
        "010",
    )
    assert load("demo", ["sft.lora.targets=[on, q_proj]"]).sft.lora.targets == ("on", "q_proj")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed=010", 10),
        ("seed=1e3", 1000),
        ("ppo.steps=1_000", 1000),
        ("sft.max_steps=null", None),
        ("dpo.beta=1e-1", 0.1),
        ("reward.probe=yes", True),
    ],
)
def test_numbers_are_decimal_whatever_yaml_makes_of_them(setting: str, value: object) -> None:
    name, _, text = setting.partition("=")
    section, _, field = name.rpartition(".")
    Path("mine.yaml").write_text(f"{section}: {{{field}: {text}}}" if section else f"{field}: {text}")
    for config in (load("demo", [setting]), load("mine.yaml", [])):
        assert getattr(getattr(config, section) if section else config, field) == value


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("seed=true", "seed must be a valid integer, unable to parse string as an integer, got 'true'"),
        ("seed=1:30", "seed must be a valid integer"),
        ("ppo.steps=0x10", "ppo.steps must be a valid integer"),
        ("reward.probe=2024-01-01", "reward.probe must be a valid boolean"),
    ],
)
def test_what_is_no_number_is_refused_not_read_as_another_one(setting: str, sentence: str) -> None:
    name, _, text = setting.partition("=")
    Path("mine.yaml").write_text(
        "".join(f"{part}:\n{'  ' * (depth + 1)}" for depth, part in enumerate(name.split("."))) + text
    )
    for arguments in (("demo", [setting]), ("mine.yaml", [])):
        with pytest.raises(InputError, match=sentence):
            load(*arguments)


@pytest.mark.parametrize(
    "settings",
    [["source.path=x.jsonl", "source.kind=hh-rlhf"], ["source.kind=hh-rlhf", "source.path=x.jsonl"]],
)
def test_the_order_of_settings_does_not_matter(settings: list[str]) -> None:
    assert load("demo", settings).source.path == "x.jsonl"  # not the hub's data set


def test_settings_are_laid_over_the_defaults_of_their_own_section() -> None:
    changed = load(
        "demo",
        [
            "sft.lora.rank=4",
            "reward.lora.dropout=0.1",
            "base.steps=7",
            "ppo.learning_rate=3e-4",
            "sft.lora.targets=[q_proj]",
        ],
    )
    assert changed.sft.lora == Pipeline().sft.lora.model_copy(update={"rank": 4, "targets": ("q_proj",)})
    assert (changed.reward.lora.rank, changed.reward.lora.alpha) == (8, 32)
    assert changed.base == Pipeline().base.model_copy(update={"steps": 7})
    assert changed.ppo.learning_rate == 3e-4


def test_a_section_of_another_kind_starts_from_that_kinds_defaults() -> None:
    changed = (
        load("demo", ["source.kind=stack-exchange", "source.path=x.xml"])
        if False
        else load("demo", ["source={kind: stack-exchange, path: x.xml}"])
    )
    assert changed.source.model_dump() == {"kind": "stack-exchange", "path": "x.xml", "site": ""}
    assert load("demo", ["source.kind=stack-exchange", "source.path=x.xml"]) == changed
    assert load("travel-tiny", ["source.path=y.xml"]).source.path == "y.xml"


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_is_valid_and_partial(name: str) -> None:
    assert load(name, [])
    assert isinstance(yaml.safe_load(profiles.find(name).read_text()), dict)


def test_a_profile_heading_with_nothing_under_it_changes_nothing() -> None:
    Path("mine.yaml").write_text("ppo:\nseed: 3\n")
    assert load("mine.yaml", []) == Pipeline(seed=3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("run", "plan", "report", "job", "up", "deploy", "work", "landed", "gc", "doctor")
        ),
    ],
)
def test_help_is_everywhere_with_an_example(capsys, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    assert "example" in capsys.readouterr().out


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"alignflow {version('alignflow')}\n"


@pytest.mark.parametrize(
    ("gone", "arguments", "sentence"),
    [
        (
            "torch",
            ["run", "demo"],
            "Training and sampling: torch must be installed here: pip install 'alignflow[train]'",
        ),
        (
            "peft",
            ["run", "demo", "--set", "base={kind: hugging-face, path: far/away}"],
            "Training and sampling: peft must be installed here",
        ),
        (
            "bitsandbytes",
            ["run", "demo", "--set", "weights.base=nf4"],
            "weights.base=nf4: bitsandbytes must be installed here: pip install 'alignflow[gpu]'",
        ),
        (
            "accelerate",
            ["run", "demo"],
            "Training and sampling: accelerate must be installed here: pip install 'alignflow[train]'",
        ),
        ("bitsandbytes", ["run", "stack-llama-7b"], "weights.base=int8: bitsandbytes must be installed here"),
        (
            "distributed",
            ["run", "demo", "--set", "machine.dask=tcp://h:1"],
            "machine.dask: distributed must be installed here",
        ),
        (
            "flask_wtf",
            ["up"],
            "alignflow up: flask_wtf must be installed here: pip install 'alignflow[server]'",
        ),
    ],
)
def test_what_is_not_installed_is_said_before_anything_starts(
    capsys, empty_place: Path, monkeypatch: pytest.MonkeyPatch, gone: str, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == gone else name)
    assert refused(capsys, *arguments).startswith(sentence)
    assert list(empty_place.iterdir()) == []


def test_a_home_that_lacks_a_stage_cannot_be_run_without_its_packages(
    capsys, empty_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_place / "home" / "objects").mkdir(parents=True)  # all stages might be stored
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "torch" else name)
    sentence = (
        "To build pretrain, sft, merge, reward, ppo, reference, dpo, answers, winrate, benchmarks: "
        "torch must be installed here: pip install 'alignflow[train]'"
    )
    assert refused(capsys, "run", "demo") == sentence
    assert not (empty_place / "home" / "logs" / "prefect-server.log").exists()


def test_what_workers_do_need_not_be_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    extras.check_packages(load("demo", ["pools.gpu=gpu", "weights.base=nf4"]))


def test_a_job_by_hand_needs_only_what_its_stage_takes(empty_place: Path) -> None:
    Path("Posts.xml").write_text("<posts/>")
    Path("mine.yaml").write_text(
        "source: {kind: stack-exchange, path: Posts.xml}\nbase: {kind: hugging-face, path: ./gone}\n"
    )
    assert cli.main(["job", "mine.yaml", "data", "work"]) == 0
    assert json.loads((empty_place / "work" / "job.json").read_text())["inputs"] == {
        "source": str(empty_place / "Posts.xml")
    }


@pytest.mark.parametrize("name", ["json.py", "tasks/__init__.py"])
def test_a_job_is_not_run_by_hand_on_the_modules_of_the_working_folder(
    empty_place: Path, capsys, name: str
) -> None:
    Path("Posts.xml").write_text("<posts/>")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("")
    assert cli.main(["job", "demo", "site", "work"]) == 0
    assert capsys.readouterr().out == "python -P -m tasks.programs.site work\n"


@pytest.mark.parametrize(
    ("profile", "title"),
    [("demo", "demo"), ("a/mine.v2.yaml", "mine.v2"), ("mine.v2", "mine.v2"), ("x.yml", "x")],
)
def test_a_profiles_title_is_its_files_name(profile: str, title: str) -> None:
    assert profiles.title(profile) == title


def test_figures_read_well() -> None:
    assert (
        format_metric({"value": 0.7312, "low": 0.69, "high": 0.768, "n": 500})
        == "0.731 (0.690 to 0.768, n 500)"
    )
    assert format_metric({"value": 3, "n": 10}) == "3 (n 10)"
    assert (
        format_metric(1234567),
        format_metric(0.00012),
        format_metric(12345.6),
        format_metric(0.0),
        format_metric("x"),
    ) == (
        "1,234,567",
        "0.00012",
        "12,346",
        "0.000",
        "x",
    )


def test_the_stage_table_is_escaped() -> None:
    table = stage_table([{"name": "<b>", "key": "k" * 64, "cached": True, "seconds": 1.0, "peak_mb": 5.0}])
    assert "<b>" not in table
    assert "&lt;b&gt;" in table
    assert 'class="stages"' in table


# -------------------------------------------------------------------- whole runs with tiny programs


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_programs.make_tree(tmp_path_factory.mktemp("cli") / "tree")


@pytest.fixture(scope="module")
def first(tree: Path) -> tuple[Path, dict, str]:
    """Return a first run from nothing: its home, its summary, its output."""
    home = tree.parent / "home"
    status, out, error = fake_programs.run_cli(tree, home, "run", "demo", "--summary", "first.json")
    assert (status, error) == (0, "")
    return home, json.loads((home.parent / "first.json").read_text()), out


def test_a_run_shows_stages_figures_and_report_without_noise_or_control_characters(first) -> None:
    home, summary, out = first
    assert [stage["name"] for stage in summary["stages"]] == list(fake_programs.STAGES)
    assert not any(stage["cached"] for stage in summary["stages"])
    assert summary["profile"] == "demo"
    assert summary["metrics"]["gold_win_rate.ppo"] == {"value": 0.7, "low": 0.6, "high": 0.8, "n": 10}
    assert summary["metrics"]["ppo.kl"] == 0.5
    assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert "Prefect.io" not in out
    assert f"Report       {home / 'report.html'}" in out
    assert " 4/13 sft        built in" in out
    assert "0.700 (0.600 to 0.800, n 10)" in out


def test_the_page_holds_this_runs_stages_and_is_kept_by_mlflow(first) -> None:
    home, _, _ = first
    page = (home / "report.html").read_text()
    assert "<!--stage-table-->" not in page
    assert page.count("<td>built</td>") == len(fake_programs.STAGES)
    with sqlite3.connect(home / "mlflow.db") as database:
        (parents,) = database.execute(
            "select count(*) from runs where name like 'demo 20%' and status = 'FINISHED'"
        ).fetchone()
        (children,) = database.execute(
            "select count(*) from tags where key = 'mlflow.parentRunId'"
        ).fetchone()
    database.close()
    assert (parents, children) == (1, len(fake_programs.STAGES))
    assert [path.read_text() for path in (home / "mlartifacts").glob("*/artifacts/report.html")] == [page]


def test_prefect_shows_the_stages_and_what_each_takes(first) -> None:
    home, _, _ = first
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        rows = database.execute("select name, state_name, task_inputs from task_run").fetchall()
        artifacts = database.execute("select key, type from artifact where key is not null").fetchall()
    database.close()
    assert artifacts == [("report", "markdown")]
    inputs = {name: json.loads(text) for name, _, text in rows}
    assert {state for _, state, _ in rows} == {"Completed"}
    assert len(inputs["sft"]["data"]) == 1
    assert len(inputs["ppo"]["reward"]) == 1
    assert len(inputs["answers"]["others"]) == 2


def test_plan_says_what_would_be_built_and_why(tree: Path, first) -> None:
    home, _, _ = first
    status, out, error = fake_programs.run_cli(tree, home, "plan", "demo", "--set", "ppo.kl_coefficient=0.2")
    assert (status, error) == (0, "")
    lines = {line.split()[0]: line.strip().split(maxsplit=2)[1:] for line in out.splitlines()}
    assert lines["ppo"] == ["build", "ppo.kl_coefficient 0.1 -> 0.2"]
    assert lines["answers"] == ["build", "if ppo differs"]
    assert lines["winrate"] == ["build", "if answers differs"]
    assert lines["benchmarks"] == ["build", "if ppo differs"]
    assert lines["report"] == ["build", "if answers, benchmarks, ppo, winrate differ"]
    assert {name for name, told in lines.items() if told == ["reuse"]} == {*fake_programs.STAGES} - {
        "ppo",
        "answers",
        "winrate",
        "benchmarks",
        "report",
    }


def test_a_job_written_by_hand_runs_by_hand(tree: Path, first, tmp_path: Path) -> None:
    home, _, _ = first
    status, out, _ = fake_programs.run_cli(tree, home, "job", "demo", "ppo", str(tmp_path / "work"))
    assert status == 0
    assert out == f"python -m tasks.programs.ppo {tmp_path / 'work'}\n"
    job = json.loads((tmp_path / "work" / "job.json").read_text())
    assert Path(job["inputs"]["model"], "config.json").is_file()
    assert set(job["inputs"]) == {"data", "model", "reward"}


def test_ctrl_c_ends_the_program_and_the_next_run_builds_only_what_changed(tree: Path, first) -> None:
    home, _, _ = first
    fake_programs.misbehave(tree, "ppo", "hang-at 3")
    process = fake_programs.start_cli(tree, home, "run", "demo", "--set", "ppo.kl_coefficient=0.2")
    deadline = time.monotonic() + 900
    while not any("3" in path.read_text() for path in home.glob("partial/*/taken.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=900)
    assert process.returncode == 130
    assert error == "alignflow: Interrupted; the same command goes on from where it stopped.\n"
    assert "Traceback" not in out
    assert re.search(r"ppo +interrupted\n", out)
    assert not alive(f"tasks.programs.ppo {home}")
    fake_programs.misbehave(tree, "ppo", "")
    status, out, error = fake_programs.run_cli(
        tree, home, "run", "demo", "--set", "ppo.kl_coefficient=0.2", "--summary", "third.json"
    )
    assert (status, error) == (0, "")
    assert "goes on from its checkpoint" in out
    third = json.loads((home.parent / "third.json").read_text())
    assert [stage["name"] for stage in third["stages"] if not stage["cached"]] == [
        "ppo",
        "answers",
        "winrate",
        "benchmarks",
        "report",
    ]


def test_bad_input_that_only_a_program_can_see_is_one_sentence(tree: Path, first) -> None:
    home, _, _ = first
    fake_programs.misbehave(tree, "reward", "input")
    status, _, error = fake_programs.run_cli(
        tree, home, "run", "demo", "--set", "reward.epochs=3", "--summary", "refused.json"
    )
    fake_programs.misbehave(tree, "reward", "")
    assert (status, error) == (2, "alignflow: reward: These posts hold no question with two answers.\n")
    assert not (home.parent / "refused.json").exists()
    assert not list((home / "partial").iterdir())


def test_the_log_of_a_failed_stage_ends_in_its_flow_runs_log(tree: Path, first) -> None:
    home, _, _ = first
    fake_programs.misbehave(tree, "reward", "fail")
    status, _, error = fake_programs.run_cli(tree, home, "run", "demo", "--set", "reward.epochs=4")
    fake_programs.misbehave(tree, "reward", "")
    assert (status, error.count("\n")) == (1, 1)
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        rows = database.execute(
            "select message from log where message like 'The last lines of the log of the stage reward%'"
        ).fetchall()
        names = [name for (name,) in database.execute("select name from flow_run").fetchall()]
    database.close()
    ((message,),) = rows
    assert "hello from reward" in message
    assert message.endswith("RuntimeError: CUDA went away")
    assert all(re.fullmatch(r"demo 20\d\d-\d\d-\d\d \d\d:\d\d [0-9a-f]{6}", name) for name in names)


def test_a_run_says_once_which_stages_an_earlier_version_built(tree: Path, first, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(first[0], home)
    for stage in ("winrate", "report"):
        for number, entry in enumerate(sorted((home / "objects" / stage).iterdir())):
            manifest, key = json.loads((entry / "manifest.json").read_text()), f"{number:064d}"
            manifest |= {"schema": SCHEMA - 1, "key": key}
            (entry / "manifest.json").write_text(json.dumps(manifest))
            entry.rename(entry.with_name(key))
    sentence = "The stored artifacts of winrate, report are of an earlier version of alignflow"
    status, out, error = fake_programs.run_cli(tree, home, "run", "demo", "--summary", "again.json")
    assert (status, error, out.count(sentence)) == (0, "", 1)
    stages = json.loads((tmp_path / "again.json").read_text())["stages"]
    assert [stage["name"] for stage in stages if not stage["cached"]] == ["winrate", "report"]
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        (logged,) = database.execute(
            "select count(*) from log where message like ?", [f"{sentence}%"]
        ).fetchone()
    database.close()
    assert logged == 1


def test_the_second_run_reuses_everything_and_no_server_is_left(tree: Path, first) -> None:
    home, _, _ = first
    status, out, error = fake_programs.run_cli(tree, home, "run", "demo", "--summary", "second.json")
    assert (status, error) == (0, "")
    summary = json.loads((home.parent / "second.json").read_text())
    assert all(stage["cached"] for stage in summary["stages"])
    assert out.count("reused") == 2 * len(fake_programs.STAGES)
    assert not alive("prefect.server.api.server:create_app")


def alive(words: str) -> list[int]:
    """Return processes of this test's own tree whose command line contains ``words``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if words in command and "/cli0/home" in environment:
            found.append(int(folder.name))
    return found
