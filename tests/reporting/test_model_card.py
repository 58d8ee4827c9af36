"""Test the model card: valid for the Hugging Face hub, and no text of a model, user or data is markup."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from markdown_it import MarkdownIt

from tasks.programs.runtime.program import Run
from tasks.reporting.model_card.licences import choose_licence
from tasks.reporting.model_card.markdown import escape_markdown
from tasks.rlhf.evaluation.intervals import wilson
from tests.support.reports import EVIL, make_run, render_report, write_stage

HOSTILE = (
    'x"\n---\nlicense: mit\n# Heading\n- [a](https://evil.example) ![b](http://evil.example/b.png) '
    "| c `d` $e$ www.evil.example"
)
# what GitHub and the hub make links of without brackets
BARE_ADDRESS = re.compile(r"(?i)(https?|ftp|mailto):|www\.|[^\\]@")


def card_of(run: Run, policy: str = "ppo") -> str:
    render_report(run)
    return (run.artifact / "model-cards" / policy / "README.md").read_text(encoding="utf-8")


def html_of(markdown: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown)


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_card_is_valid_and_has_every_result_with_its_interval(tmp_path: Path) -> None:
    card = ModelCard(card_of(make_run(tmp_path)))
    found = {one.metric_name: one for one in card.data.eval_results or []}
    against_sft = found["Win rate against SFT, judged by the gold scorer"]
    assert (against_sft.metric_value, against_sft.metric_args["high"], against_sft.metric_args["n"]) == (
        1.0,
        1.0,
        30,
    )
    assert 0.8 < against_sft.metric_args["low"] < 0.9
    assert set(found) == {
        f"Win rate against {name}, judged by the gold scorer" for name in ("SFT", "DPO", "the chosen answers")
    }  # not the reward model's: PPO was trained to please it
    index = eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert index == card.data.to_dict()["model-index"]
    assert {"ppo", "alignflow"} <= set(card.data.tags)
    assert str(ModelCard(str(card))) == str(card)


def test_a_policy_that_was_second_in_a_comparison_has_its_own_rate(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rates = {one.metric_name: one for one in ModelCard(card_of(run, "dpo")).data.eval_results or []}
    ours = rates["Win rate against PPO, judged by the gold scorer"]
    metrics = json.loads((run.inputs["winrate"] / "summary.json").read_text())["metrics"]
    theirs = metrics["gold_win_rate.ppo_vs_dpo"]
    assert ours.metric_value == pytest.approx(1 - theirs["value"], abs=1e-4)
    assert ours.metric_args["low"] == pytest.approx(1 - theirs["high"], abs=1e-4)
    assert "Win rate against SFT, judged by the reward model" in rates


@pytest.mark.parametrize("policies", [("ppo",), ("dpo",), ()])
def test_each_trained_policy_has_a_card(tmp_path: Path, policies: tuple[str, ...]) -> None:
    run = make_run(tmp_path, policies=policies)
    render_report(run)
    assert {path.parent.name for path in run.artifact.glob("model-cards/*/README.md")} == set(policies)


def test_no_text_becomes_metadata_or_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    licences = {HOSTILE: 3, EVIL: 1}
    change(run.inputs["data"] / "card.json", site=HOSTILE, licences=licences, dropped={HOSTILE: 1, EVIL: 2})
    change(run.inputs["reward"] / "summary.json", warnings=[HOSTILE, f"- {HOSTILE}", f"1. {HOSTILE}", EVIL])
    text = card_of(run)
    card = ModelCard(text)
    assert card.data.license == "other"
    assert card.data.model_name == f"PPO on {HOSTILE}"
    shown = html_of(card.text)
    tags = set(re.findall(r"<(/?\w+)", shown))
    assert not tags & {"script", "img", "code", "blockquote", "h3", "em", "s"}
    assert re.findall(r'href="([^"]*)"', shown) == ["https://github.com/alignflow/alignflow"]
    assert len(re.findall("<h1>", shown)) == 1
    assert "alert(" in shown
    assert not BARE_ADDRESS.search(card.text.replace("](https://github.com/alignflow/alignflow)", ""))
    for row in re.findall(r"<tr>(.*?)</tr>", shown, re.DOTALL):
        assert row.count("</td>") + row.count("</th>") in (2, 4, 5)


def test_the_card_says_whose_texts_it_learnt_from_and_what_is_known_against_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change(run.inputs["reward"] / "summary.json", warnings=["It is fooled."])
    text = card_of(run)
    for said in (
        "CC BY-SA, which asks for attribution",
        "the users of a.org",
        "| CC BY-SA 4.0 | 18 |",
        "Warning of the stage reward: It is fooled.",
        "| SFT | the reward model (does not count, see below) |",
        "KL from SFT: 6.00 nats",
        "<!--run-facts-->",
        "<!--settings-->",
    ):
        assert said in text
    assert ModelCard(text).data.license == "cc-by-sa-4.0"


def add_round(run: Run, name: str, labeller: dict[str, Any], **figures: Any) -> Path:
    """Add the comparisons of a round to the inputs of a report."""
    counts = {"asked": 20, "pairs": 17, "raters": 1, "flagged": 0} | figures
    metrics = {f"comparisons.{name}": value for name, value in counts.items()}
    folder = write_stage(run.directory.parent / name, metrics, labeller=labeller)
    names = figures.get("names", ["gold"])
    (folder / "agreement.json").write_text(json.dumps({"raters": [{"name": one} for one in names]}))
    run.inputs[name] = folder
    return folder


def rows_of_rounds(text: str) -> list[list[str]]:
    """Return the cells of the card's table of rounds, without its head."""
    _, found, rest = text.partition("Who compared the policies' answers:\n\n")
    lines = rest.partition("\n\n")[0].splitlines()[2:] if found else []
    return [
        [cell.strip().replace("\N{NO-BREAK SPACE}", " ") for cell in line.split("|")[1:-1]] for line in lines
    ]


def test_the_card_says_who_compared_in_each_round(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert rows_of_rounds(card_of(run)) == []
    add_round(run, "comparisons1", {"kind": "gold", "noise": 0.1, "tie": 0.0})
    add_round(run, "comparisons2", {"kind": "judge", "judge": f"the language model {HOSTILE}"}, asked=1234)
    add_round(run, "comparisons3", {"kind": "file"}, raters=2)
    alpha, right = {"value": 0.75, "low": 0.5, "high": 0.875, "n": 12}, wilson(9, 12)._asdict()
    add_round(
        run,
        "comparisons",
        {"kind": "people"},
        raters=3,
        flagged=1,
        alpha=alpha,
        right_on_gold_questions=right,
    )
    text = card_of(run)
    gold, judge, file, people = rows_of_rounds(text)
    assert gold == ["1", "the gold scorer, 10.0 % of its verdicts turned round", "20", "17", "–", "–", "–"]
    assert judge[0] == "2"
    assert "1,234" in judge
    assert file == ["3", "a file of labels", "20", "17", "2", "–", "–"]
    assert people[:5] == ["4", "people", "20", "17", "3, labels of 1 left out"]
    assert people[5:] == ["0.750 (0.500 to 0.875)", "75.0 % (46.8 to 91.1 %)"]
    assert "a reward model is trained on the comparisons of all rounds" in text
    shown = html_of(ModelCard(text).text)
    assert re.findall(r'href="([^"]*)"', shown) == ["https://github.com/alignflow/alignflow"]
    assert [len(re.findall("<td", row)) for row in shown.split("<tr>") if "the language model" in row] == [7]


def test_the_card_names_no_rater_and_has_the_warnings_of_its_own_round_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    old = add_round(run, "comparisons1", {"kind": "people"})
    change(old / "summary.json", warnings=["Old takes 0.5 s for a label."])
    new = add_round(run, "comparisons", {"kind": "people"}, names=["Ann", "Ann Lee", "Bo.b"])
    told = [
        "Ann Lee prefers the answer on the left; Ann does not.",
        "The labels of Bo.b are left out: Annex.",
    ]
    change(new / "summary.json", warnings=told)
    text = card_of(run)
    assert "rater 2 prefers the answer on the left; rater 1 does not." in text
    assert "The labels of rater 3 are left out: Annex." in text
    assert "Old takes" not in text
    page = (run.artifact / "report.html").read_text()
    assert "Ann Lee prefers" in page  # which is not published
    assert "Old takes" not in page


@pytest.mark.parametrize(
    ("names", "foreign", "licence"),
    [
        (["CC BY-SA 2.5", "CC BY-SA 4.0"], False, "cc-by-sa-4.0"),
        (["CC BY-SA 4.0"], True, "other"),
        (["CC BY-SA 4.0", ""], False, "other"),
        (["mit"], False, "other"),
        ([], False, "other"),
    ],
)
def test_a_licence_is_named_only_if_the_texts_have_one(names: list[str], foreign: bool, licence: str) -> None:
    found = choose_licence(names, has_foreign_base=foreign)
    assert found.license == licence
    assert (found.license_name is None) == (licence != "other")


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        EVIL,
        "- a",
        "+ a",
        "1. a",
        "2) a",
        "=====",
        "> a",
        "# a",
        "**b**",
        "~~s~~",
        "a@b.example",
        "FTP://x",
    ],
)
def test_escaped_text_is_plain(text: str) -> None:
    shown = html_of(escape_markdown(text))
    assert re.findall(r"<(\w+)", shown) == ["p"]
    assert not BARE_ADDRESS.search(escape_markdown(text))


def test_numbers_and_signs_in_a_line_stay_readable() -> None:
    assert escape_markdown("78.5 % (76.1 to 80.9 %), −4.2") == "78.5 % (76.1 to 80.9 %), −4.2"
