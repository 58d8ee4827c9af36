"""Test the report's section on answers while a policy trained."""

import json
import re
from pathlib import Path

from tests.support.pages.html_tags import Tags
from tests.support.reports import EVIL, make_run, render_report


def section(page: str) -> str:
    found = re.search(r'<section id="progress">.*?</section>', page, re.DOTALL)
    assert found
    return found[0]


def test_every_question_has_the_answers_of_each_stage_and_step(tmp_path: Path) -> None:
    found = section(render_report(make_run(tmp_path)))
    assert "3 held-out questions, the same in every stage, answered by SFT, DPO, PPO" in found
    assert found.count("<details") == 3
    assert len(re.findall(r"<details[^>]* open>", found)) == 2
    for stage in ("sft", "dpo", "ppo"):
        assert found.count(f'<div class="answer p-{stage}">') == 3 * 4
        assert [found.count(f"{stage} answer {version}") for version in (0, 1, 2)] == [3, 3, 3]
    assert found.count("as at step 20") == 3 * 3
    assert found.count("cut at the limit of tokens") == 3 * 3
    assert found.count("reward&nbsp;<b>\N{MINUS SIGN}1.25</b>") == 3 * 4
    assert found.count("KL&nbsp;<b>0.00</b>") == 3 * 3
    assert found.count("KL&nbsp;<b>2.50</b>") == 3 * 3
    assert found.count("tokens&nbsp;<b>21</b>") == 3 * 4


def test_hostile_questions_and_answers_are_text(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = section(render_report(run))
    assert EVIL not in found
    tags = {tag for tag, _ in Tags(found).opened}
    assert tags == {"section", "input", "h2", "p", "details", "summary", "pre", "div", "span", "b"}
    assert found.count("&lt;script&gt;") == 2 * 3 + 3 * 3 * 3


def test_a_kl_that_is_not_known_is_not_shown_and_an_empty_answer_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, policies=())
    answer = {"question_id": 1, "question": "How?", "answer": "", "length": 1, "ended": True}
    (run.inputs["sft"] / "samples.jsonl").write_text(json.dumps({"step": 0, "answers": [answer]}) + "\n")
    found = section(render_report(run))
    assert "1 held-out question, the same" in found
    assert "KL&nbsp;" not in found
    assert "an empty answer" in found


def test_a_run_without_samples_has_no_section(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path, samples=False))
    assert "progress" not in page.partition("</style>")[2]
