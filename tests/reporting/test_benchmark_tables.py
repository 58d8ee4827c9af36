"""Test the report's part on what alignment costs, and the figures behind it, with planted answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.config.benchmark_files import Document
from tasks.programs.runtime import benchmark_report
from tasks.programs.runtime.benchmark_tasks import Task
from tasks.programs.runtime.program import to_json
from tasks.reporting import benchmark_tables
from tasks.rlhf.evaluation.harness import Result
from tasks.rlhf.evaluation.perplexity import Texts
from tests.support.pages.html_tags import Tags
from tests.support.reports import EVIL, make_run, render_report, write_stage

Row = dict[str, Any]


def planted(lost: int, won: int, n: int = 100) -> dict[str, list[Result]]:
    """Return answers of SFT, half of them right, and of PPO, which loses some of these and wins others."""
    sft = [1.0] * (n // 2) + [0.0] * (n // 2)
    ppo = [0.0] * lost + sft[lost : n - won] + [1.0] * won
    return {
        name: [Result([-1.0, -2.0], acc, acc, is_cut=False) for acc in right]
        for name, right in (("base", sft), ("sft", sft), ("ppo", ppo))
    }


def quiz(n: int = 100, num_fewshot: int = 0) -> Task:
    return Task(
        "quiz", "multiple_choice", num_fewshot, [Document(i, "?", ["a", "b"], 0) for i in range(n)], []
    )


@pytest.mark.parametrize(
    ("lost", "won", "p", "shown"),
    [
        (15, 5, 0.041389, True),
        (5, 15, 0.041389, False),
        (8, 8, 1, False),
        (3, 0, 0.25, False),
        (0, 0, 1, False),
    ],
)
def test_the_tax_is_paired_and_tested_by_mcnemar(lost: int, won: int, p: float, shown: bool) -> None:
    rows = benchmark_report.benchmark_rows(quiz(), planted(lost, won))
    assert [row["name"] for row in rows] == ["quiz", "quiz.acc_norm"]
    metrics = benchmark_report.row_metrics(rows[0])
    assert metrics["benchmark.quiz.sft"]["value"] == 0.5
    assert metrics["benchmark.quiz.ppo"]["value"] == pytest.approx(0.5 + (won - lost) / 100)
    tax = metrics["tax.quiz.ppo_vs_sft"]
    assert tax["value"] == pytest.approx(lost - won)  # points; above 0 is worse
    assert tax["low"] <= tax["value"] <= tax["high"]
    assert metrics["mcnemar.quiz.ppo_vs_sft"] == pytest.approx(p, abs=1e-6)
    assert metrics["tax.quiz.sft_vs_base"]["value"] == 0
    by_pair = {(tax["ours"], tax["theirs"]): tax["is_shown"] for tax in rows[0]["taxes"]}
    assert by_pair == {("ppo", "sft"): shown, ("sft", "base"): False, ("ppo", "base"): shown}
    sentences = benchmark_report.warnings(rows[:1])
    assert len(sentences) == int(shown)
    if shown:
        assert sentences[0].startswith("PPO is shown to be worse than the SFT model on quiz by 10.0 points (")


def test_unpaired_rates_would_not_show_the_same_loss() -> None:
    """26 of 400 documents are lost and 10 won: 4 points, less than the width of either rate's interval."""
    (row, _) = benchmark_report.benchmark_rows(quiz(400), planted(26, 10, 400))
    ppo, sft = row["values"]["ppo"], row["values"]["sft"]
    assert ppo["high"] > sft["value"]
    assert row["taxes"][0]["is_shown"]


def test_a_number_of_examples_is_part_of_the_name() -> None:
    (row, _) = benchmark_report.benchmark_rows(quiz(num_fewshot=5), planted(1, 1))
    assert "tax.quiz.5shot.ppo_vs_sft" in benchmark_report.row_metrics(row)


def perplexities() -> list[Any]:
    texts = Texts([], torch.full((50,), 10.0), torch.full((50,), 40.0))
    losses = torch.linspace(10, 20, 50, dtype=torch.float64)
    return benchmark_report.perplexity_rows({"base": losses, "sft": losses - 2, "ppo": losses}, texts)


def test_a_higher_perplexity_is_a_tax_in_per_cent() -> None:
    rows = perplexities()
    metrics = {name: value for row in rows for name, value in benchmark_report.row_metrics(row).items()}
    assert metrics["tax.perplexity.ppo_vs_sft"]["value"] == pytest.approx(22.1403, abs=1e-3)  # e^0.2 - 1
    assert metrics["tax.perplexity.sft_vs_base"]["value"] == pytest.approx(-18.1269, abs=1e-3)
    assert metrics["perplexity.base"]["value"] == pytest.approx(4.48169, abs=1e-4)  # e^1.5
    assert [tax["is_shown"] for tax in rows[0]["taxes"]] == [True, False, False]
    assert benchmark_report.warnings(rows) == []


def add_benchmarks(root: Path, rows: list[Any], metrics: dict[str, Any] | None = None) -> str:
    """Return the page of a made-up run with a stage benchmarks."""
    run = make_run(root)
    folder = write_stage(root / "benchmarks", metrics or {})
    results = {"models": ["base", "sft", "ppo"], "rows": rows}
    (folder / "results.json").write_text(to_json(results))
    run.inputs["benchmarks"] = folder
    return render_report(run)


def test_the_page_has_a_table_with_marks(tmp_path: Path) -> None:
    rows = perplexities() + benchmark_report.benchmark_rows(quiz(), planted(15, 5))
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 1234}
    metrics = {"reward_bench.Precise_IF": score, "reward_bench.Ties": score, "reward_bench.total": 0.5}
    page = add_benchmarks(tmp_path, rows, metrics)
    assert Tags(page).open == []
    part = page[page.index("What it costs") : page.index("Sample answers</h2>")]
    assert part.count("⚠︎ worse, shown") == 5  # PPO against SFT: perplexity, acc and acc_norm; against base: 2
    assert "SFT: +10.0 (" in part
    assert part.count("⚠︎ worse, shown, p 0.041<") == 4
    assert "SFT: +22.1 (" in part
    assert "base model: −18.1 (" in part
    assert "Precise IF" in part
    assert "1,234 rows" in part
    assert "1,234 questions" in part
    assert 'href="#costs"' in page


def test_names_of_files_do_not_become_markup(tmp_path: Path) -> None:
    rows: list[Any] = json.loads(to_json(benchmark_report.benchmark_rows(quiz(), planted(15, 5))))
    for row in rows:
        row["name"] = EVIL
    metrics = {f"reward_bench.{EVIL}": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}}
    page = add_benchmarks(tmp_path, rows, metrics)
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img", "iframe", "object", "link"}


def test_an_unbounded_interval_is_a_dash() -> None:
    texts = Texts([], torch.ones(1), torch.ones(1))
    losses = torch.ones(1, dtype=torch.float64)
    rows = benchmark_report.perplexity_rows({"base": losses, "sft": losses}, texts)
    results = json.loads(to_json({"models": ["base", "sft"], "rows": rows}))
    cells = benchmark_tables.build_rows(results)[0]["cells"]
    assert cells[1]["losses"][0]["text"] == "0.0 (−100.0 to –)"


def test_a_run_without_the_stage_has_no_such_part(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path))
    assert "What it costs" not in page
    assert "#costs" not in page
