"""Test the report of a run: what it says, and that no text of a model or a user becomes markup."""

import json
import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.artifacts.code_version import source_digests
from tasks.reporting import charts, reward_charts, stage_charts, stage_panels
from tasks.reporting.evaluation.judges import describe_result
from tasks.reporting.numbers import format_number
from tasks.reporting.pages import STYLE
from tasks.reporting.run_report import PARTS, TEMPLATE
from tasks.reporting.text import build_link, clip_text, link_author
from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.thresholds import FOOLED
from tests.support.pages.html_tags import Tags
from tests.support.paths import ROOT
from tests.support.reports import EVIL, LOOKS, MEASURES, RATE, make_run, render_report


def test_no_text_of_a_model_a_user_or_a_label_becomes_markup(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path))
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img", "iframe", "object", "link"}
    assert not [name for _, attributes in tags.opened for name in attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 12 * 4


def test_the_marker_stands_there_once(tmp_path: Path) -> None:
    assert render_report(make_run(tmp_path)).count("<!--stage-table-->") == 1


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path))
    links = [attributes for tag, attributes in Tags(page).opened if tag == "a"]
    assert {"https://a.org/q/1", "https://a.org"} <= {attributes["href"] for attributes in links}
    without_links = re.sub(r'<a href="[^"]*"', "<a", page)
    assert "http:" not in without_links
    assert "https:" not in without_links
    assert not re.search(r"url\(|@import|\bsrc=", without_links.replace("src=x", ""))


def test_equal_artifacts_give_equal_bytes(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "here"), make_run(tmp_path / "there")
    page = render_report(first)
    (second.directory / "metrics.jsonl").write_text('{"step": 1, "total": 1, "time": 5}\n')
    assert render_report(second) == page
    assert [(first.artifact / n).read_bytes() for n in ("metrics.jsonl", "summary.json")] == [
        (second.artifact / n).read_bytes() for n in ("metrics.jsonl", "summary.json")
    ]
    assert str(tmp_path) not in page


@pytest.mark.parametrize("policies", [("ppo",), ("dpo",), ("dpo", "ppo"), ()])
@pytest.mark.parametrize("without", [(), ("site", "pretrain")])
def test_a_run_without_some_stages_has_a_page_without_their_parts(
    tmp_path: Path, policies: tuple[str, ...], without: tuple[str, ...]
) -> None:
    page = render_report(make_run(tmp_path, policies=policies, without=without))
    assert ("<h3>Base model" in page) == ("pretrain" not in without)
    assert "<h3>Reference</h3>" in page
    for name in ("PPO", "DPO"):
        assert (f"<h3>{name} <small>60 steps" in page) == (name.lower() in policies)
        assert (f"{name} against SFT" in page) == (name.lower() in policies)


@pytest.mark.parametrize(
    "failed",
    [("winrate",), ("winrate", "reward", "ppo"), ("winrate", "ppo", "dpo", "reward", "merge", "sft")],
)
def test_a_run_some_of_whose_stages_failed_has_a_page_of_the_others(
    tmp_path: Path, failed: tuple[str, ...]
) -> None:
    run = make_run(tmp_path)
    for stage in failed:
        del run.inputs[stage]
    page = render_report(run)
    assert "No policies were compared in this run." in page
    assert "No policy answered any question in this run." in page
    assert "What the judges are worth" not in page
    for stage in ("sft", "reward", "ppo", "dpo"):
        title = stage_panels.TITLES[stage][0]
        assert (f"<h3>{title} <small>60 steps" in page) == (stage not in failed)
    assert ("Reward model and baselines" in page) == bool({"reward", "dpo"} - set(failed))
    assert (run.artifact / "card.html").exists()


def test_the_page_begins_with_the_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = render_report(run)
    said = r"PPO wins 100\.0\s% \(88\.\d to 100\.0\s%\) against SFT: better, judged by the gold scorer"
    assert re.search(f"<h1>{said}</h1>", page)
    assert re.fullmatch(said, json.loads((run.artifact / "headline.json").read_text())["sentence"])
    places = [page.index(part) for part in ("<!--run-facts-->", "<h1>", "<!--gates-->", 'class="warning"')]
    places += [page.index(f'id="{name}"') for name in ("leaderboard", "judges", "wins", "samples", "run")]
    assert places == sorted(places)


def test_without_a_gold_scorer_the_page_says_how_little_the_reward_model_proves(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path, gold=False))
    said = "not shown to be better; an upper bound, as PPO was trained to please its judge, the reward model"
    assert f"{said}</h1>" in page
    assert "gold score" not in page


def test_the_leaderboard_says_what_each_policy_wins_and_costs(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary_file = run.inputs["winrate"] / "summary.json"
    summary = json.loads(summary_file.read_text())
    board = leaderboard_of(render_report(run))
    assert board[0] == [
        "policy",
        "wins against SFT",
        "at equal length",
        "KL from SFT",
        "tokens",
        "ended",
        "warnings",
        "is the best",
        "score",
        "Elo",
    ]
    assert [row[0] for row in board[1:]] == ["PPO", "DPO", "SFT", "chosen answers"]
    ppo = dict(zip(board[0], board[1], strict=True))
    assert ppo["wins against SFT"].startswith("100.0 % 88.")
    assert (ppo["KL from SFT"], ppo["tokens"], ppo["warnings"]) == ("6.00", "20.00", "1")
    summary["metrics"]["gold_win_rate.ppo_vs_champion"] = RATE
    summary_file.write_text(json.dumps(summary))
    results_file = run.inputs["winrate"] / "results.json"
    results = json.loads(results_file.read_text())
    results["tallies"]["gold.ppo_vs_champion"] = {"wins": 80, "ties": 0, "losses": 20} | NONE
    results_file.write_text(json.dumps(results))
    against = dict(zip(*leaderboard_of(render_report(run))[:2], strict=True))
    assert against["against the champion"].startswith("80.0 %")


NONE = {"unparseable": 0, "flipped": 0}


def leaderboard_of(page: str) -> list[list[str]]:
    """Return the cells of the leaderboard as text, row by row."""
    table = page[page.index('<table class="standings">') :].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_a_site_that_does_not_exist_is_not_linked(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path, site="shell.example"))
    assert "https://shell.example" not in page
    assert "is invented" in page


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.51, 0.6, "beats"), (0.3, 0.49, "loses to"), (0.4, 0.6, "is level with"), (0.5, 0.7, "is level with")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low: float, high: float, said: str) -> None:
    assert describe_result({"low": low, "high": high}) == said


def test_only_web_addresses_become_links() -> None:
    assert build_link("javascript:name/1", "x") == "x"
    assert build_link("//a.org/1", "x") == "x"
    assert build_link("https://shell.example/q/1", "x") == "x"
    assert 'href="https://a.org/?a=&#34;&gt;"' in build_link('https://a.org/?a=">', "x")
    assert "&lt;b&gt;" in build_link("https://a.org/q/1", "<b>")


def test_an_author_without_a_name_is_a_linked_profile() -> None:
    assert (
        link_author("https://a.org/users/9")
        == '<a href="https://a.org/users/9" target="_blank" rel="noreferrer">user 9</a>'
    )
    assert link_author("https://shell.example/users/9") == "user 9"
    assert link_author("Ann of https://a.org/users/9") == "Ann of https://a.org/users/9"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert clip_text("a" * 1500, 1500) == "a" * 1500
    assert clip_text("a" * 3600, 1500) == "a" * 1500 + " … (2,100 more characters)"


def test_labels_of_charts_are_escaped() -> None:
    drawings = [
        charts.draw_curves([charts.Curve("<b>", [(1, 1), (2, 3)])], title="<i>"),
        charts.draw_columns([("<b>", 3)], title="<i>", unit="<u>"),
        charts.draw_share_bar([('"><b>', 0.5)], value=0.5, low=0.4, high=0.6, title="<i>"),
        charts.draw_curves(
            [charts.Curve("<b>", [(1, 1)], sparse=True)], title="<i>", mark=charts.Mark(1, 1, "<u>")
        ),
        charts.draw_reliability([charts.Dot(0.7, 0.6, 0.5, 0.8, 3)], title="<i>", unit="<u>"),
    ]
    for drawing in drawings:
        assert not {tag for tag, _ in Tags(drawing).opened} & {"b", "i", "u"}


def test_curves_live_with_nothing_one_value_and_what_is_no_number() -> None:
    assert charts.draw_curves([], title="") == ""
    assert charts.draw_curves([charts.Curve("a", [(1, float("nan"))])], title="") == ""
    for points in ([(1, 0.0)], [(1, 5.0), (2, 5.0)], [(1, float("inf")), (2, -1.0), (3, -2e9)]):
        assert not re.search("nan|inf", charts.draw_curves([charts.Curve("a", points)], title=""))


def shapes(drawing: str, tag: str, name: str) -> list[dict[str, str]]:
    """Return the attributes of the drawing's shapes of one kind and class."""
    return [
        {key: value or "" for key, value in found.items()}
        for kind, found in Tags(drawing).opened
        if kind == tag and found["class"] == name
    ]


def test_a_reliability_diagram_has_every_bin_where_its_shares_say(tmp_path: Path) -> None:
    drawing = charts.draw_reliability(
        [charts.Dot(0.75, 0.5, 0.25, 1, 100), charts.Dot(1, 1, 1, 1, 25)], title=""
    )
    left, right, low, high = (
        charts.LEFT,
        charts.WIDTH - charts.RIGHT,
        charts.HEIGHT - charts.BOTTOM,
        charts.TOP,
    )
    first, second = shapes(drawing, "circle", "s0")
    assert [float(first[key]) for key in ("cx", "cy", "r")] == [(left + right) / 2, (low + high) / 2, 6]
    assert [float(second[key]) for key in ("cx", "cy", "r")] == [
        right,
        high,
        4,
    ]  # a quarter of the pairs, half of what the radius can grow
    whisker = shapes(drawing, "line", "over s0")[0]
    assert [float(whisker[key]) for key in ("x1", "x2")] == [(left + right) / 2] * 2
    assert [float(whisker[key]) for key in ("y1", "y2")] == [low - (low - high) / 4, high]
    [diagonal] = shapes(drawing, "line", "half")
    assert [float(diagonal[key]) for key in ("x1", "y1", "x2", "y2")] == [left, (low + high) / 2, right, high]
    assert charts.draw_reliability([], title="") == ""


def test_a_sparse_curve_shows_each_point_and_the_mark_stands_on_its_own() -> None:
    looks = charts.Curve("held-out", [(10, 2.0), (20, 1.0), (30, 4.0)], sparse=True)
    steps = charts.Curve("training", [(float(step), 1.5) for step in range(1, 101)])
    drawing = charts.draw_curves([steps, looks], title="", mark=charts.Mark(20, 1.0, "kept"))
    dots, [ring], [upright] = (
        shapes(drawing, "circle", "s1"),
        shapes(drawing, "circle", "ring"),
        shapes(drawing, "line", "half"),
    )
    assert len(dots) == 3
    assert (ring["cx"], ring["cy"]) == (dots[1]["cx"], dots[1]["cy"])
    assert upright["x1"] == upright["x2"] == ring["cx"]
    assert len(shapes(drawing, "path", "s1")) == 1  # and no faint one: nothing is averaged


@pytest.mark.parametrize(
    ("x", "y", "anchor", "above"),
    [(0, 0, "start", True), (0, 1, "start", False), (9, 0, "end", True), (9, 1, "end", False)],
)
def test_the_mark_is_told_where_it_covers_neither_itself_nor_the_edge(
    x: float, y: float, anchor: str, above: bool
) -> None:
    line = charts.Curve("", [(0, 0.0), (9, 1.0)])
    found = re.search(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">kept',
        charts.draw_curves([line], title="", mark=charts.Mark(x, y, "kept")),
    )
    assert found
    assert found[3] == anchor
    assert charts.LEFT < float(found[1]) < charts.WIDTH - charts.RIGHT
    assert (float(found[2]) < charts.HEIGHT / 2) == above


def test_the_line_of_a_share_bar_stands_where_it_is_put() -> None:
    for line, place in ((0.5, "50.00"), (0.25, "25.00")):
        [drawn] = shapes(
            charts.draw_share_bar([("s0", 0.1)], value=0.1, low=0, high=0.2, title="", line=line),
            "line",
            "half",
        )
        assert (drawn["x1"], drawn["x2"]) == (place, place)


LOOKED = [(10, 0.5), (20, 0.25), (30, 0.75)]


@pytest.mark.parametrize(
    ("metrics", "step", "said"),
    [
        ({"sft.best_step": 20, "sft.held_out_loss": 0.25}, 20, "kept"),
        ({"sft.best_step": 20, "sft.held_out_loss": 0.75}, 30, "kept"),  # keep=last
        ({}, 20, "lowest"),
    ],
)
def test_the_look_of_the_kept_weights_is_marked(metrics: dict, step: int, said: str) -> None:
    mark = stage_charts.find_kept_weights("sft", LOOKED, metrics)
    assert mark == (step, dict(LOOKED)[step], f"{said}: {dict(LOOKED)[step]:.3f} at step {step}")
    assert stage_charts.find_kept_weights("sft", [], metrics) is None
    assert stage_charts.find_kept_weights("sft", [(1, float("nan"))], metrics) is None


def test_of_equal_looks_the_best_step_is_the_kept_one() -> None:
    mark = stage_charts.find_kept_weights(
        "dpo", [(1, 0.5), (2, 0.5)], {"dpo.best_step": 2, "dpo.held_out_loss": 0.5}
    )
    assert mark
    assert mark.x == 2


@pytest.mark.parametrize("stage", LOOKS)
def test_a_loss_chart_has_the_held_out_loss_where_it_was_logged(stage: str) -> None:
    lines = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    plain = stage_charts.draw_charts(stage, lines)[0]
    lines[1]["held_out_loss"], lines[3]["held_out_loss"] = 0.5, 0.75
    chart = stage_charts.draw_charts(stage, lines)[0]
    assert [label for label, _ in plain.legend] == ["training"]
    assert chart.legend == [("training", "1.00"), ("held-out", "0.750")]
    assert not shapes(plain.drawing, "circle", "ring")
    assert len(shapes(chart.drawing, "circle", "s1")) == 2
    assert len(shapes(chart.drawing, "circle", "ring")) == 1
    assert stage_charts.drawn_metrics(stage, lines) == {f"{stage}.held_out_loss", f"{stage}.best_step"}
    assert stage_charts.drawn_metrics(stage, lines[:1]) == set()


def test_lines_may_lack_any_metric() -> None:
    lines = [{"step": 1}, {"step": 2, "held_out_loss": 0.5}, {"step": 3, "loss": None}]
    [chart] = stage_charts.draw_charts("sft", lines)
    assert chart.legend == [("held-out", "0.500")]
    assert len(shapes(chart.drawing, "circle", "s0")) == 1


@pytest.mark.parametrize("stage", ["sft", "reward", "reference", "dpo"])
def test_every_metric_of_a_stage_has_a_readable_name(stage: str) -> None:
    program = (ROOT / "tasks" / "programs" / f"{stage}.py").read_text()
    names = set(re.findall(rf'"({stage}\.[a-z_]+)"', program)) - {f"{stage}.parquet", f"{stage}.json"}
    assert names
    assert not {name for name in names if name not in stage_panels.FACTS}


def test_what_is_drawn_is_no_fact_and_the_others_stand_in_their_order() -> None:
    metrics = {"sft.best_step": 3, "sft.packing_leak": 0.0, "sft.perplexity": 1.5, "sft.new_one": 7}
    assert stage_charts.format_facts(metrics, {"sft.best_step"}) == [
        ("held-out perplexity", "1.50"),
        ("leak between packed documents", "0"),
        ("new one", "7"),
    ]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("reward.ece", 0.0625, "6.2\N{NO-BREAK SPACE}%"),
        ("reward.worst_attack", 0.5, "50.0\N{NO-BREAK SPACE}%"),
        ("merge.answers_reproduced", 1.0, "100.0\N{NO-BREAK SPACE}%"),
        (
            "reward_accuracy.over_longer_wins",
            {"value": 0.25, "low": -0.125, "high": float("nan")},
            "25.0 points (−12.5 to –)",
        ),
        ("reward.length_correlation", {"value": float("nan"), "low": -1.0, "high": 1.0}, "– (−1.00 to 1.00)"),
    ],
)
def test_a_figure_is_told_in_its_unit(name: str, value: float, text: str) -> None:
    assert stage_charts.format_metric(name, value) == text


def test_the_worst_attack_comes_first_and_a_failed_one_says_so_in_words() -> None:
    [panel] = reward_charts.build_panels({"attacks": MEASURES["attacks"]})
    [(_, bars)] = panel.groups
    assert [(bar.title, "fooled" in bar.flag) for bar in bars] == [
        ("Off the subject", True),
        (EVIL.replace("_", " "), False),
        ("No answer", False),
    ]
    assert [len(shapes(bar.bar, "rect", "s1")) for bar in bars] == [1, 0, 0]
    for bar in bars:
        assert float(shapes(bar.bar, "line", "half")[0]["x1"]) == 100 * FOOLED
    assert "48 real answers" in panel.note


def test_accuracies_stand_in_groups_and_those_that_were_not_measured_are_left_out() -> None:
    [panel] = reward_charts.build_panels({"accuracy": MEASURES["accuracy"]})
    assert [len(bars) for _, bars in panel.groups] == [1, 2, 1, 1]
    assert shapes(panel.groups[-1][1][0].bar, "rect", "tie")  # a rule of thumb is not the model
    [panel] = reward_charts.build_panels({"accuracy": {"votes": RATE}})
    assert len(panel.groups) == 1


def test_what_the_probe_reached_is_drawn_beside_what_training_made_of_it() -> None:
    probe = {"accuracy": {"votes": RATE | {"value": 0.375}, "gap_1": RATE}}
    [panel] = reward_charts.build_panels({"accuracy": {"votes": RATE}, "probe": probe})
    title, [bar] = panel.groups[-1]
    assert (title, bar.title, bar.rate["value"]) == (
        "A head on the model as it was before training",
        "The probe's rewards alone",
        0.375,
    )


def test_the_names_are_those_that_the_reward_stage_writes() -> None:
    code = {
        name: (ROOT / "tasks" / "rlhf" / "evaluation" / f"{name}.py").read_text()
        for name in ("red_team", "pair_accuracy", "reward_evaluation")
    }
    assert set(re.findall(r'^        "(\w+)": ', code["red_team"], re.M)) == set(reward_charts.ATTACKS)
    for name in (
        reward_charts.PROBED.get(name, name) for _, names in reward_charts.ACCURACIES for name in names
    ):
        assert f'"{name}"' in code["pair_accuracy"] + code["reward_evaluation"]


@pytest.mark.parametrize(
    "missing", [("accuracy",), ("calibration",), ("attacks",), ("accuracy", "calibration", "attacks")]
)
def test_what_was_not_measured_is_not_drawn_and_its_figures_stay_facts(
    tmp_path: Path, missing: tuple[str, ...]
) -> None:
    run = make_run(tmp_path)
    file = run.inputs["reward"] / "measures.json"
    file.write_text(json.dumps({name: value for name, value in MEASURES.items() if name not in missing}))
    if len(missing) == 3:
        file.unlink()  # as in artifacts of old
    page = render_report(run)
    assert Tags(page).open == []
    for part, text in {
        "accuracy": "Where it is right",
        "calibration": "Calibration error 6.2",
        "attacks": "What fools it",
    }.items():
        assert (text in page) == (part not in missing)
    assert ("<dt>pairs ordered as the votes</dt><dd>80.0" in page) == ("accuracy" in missing)


def test_a_calibration_tells_both_errors_and_its_temperature() -> None:
    [chart] = reward_charts.draw_calibration(MEASURES)
    for text in (
        "6.2\N{NO-BREAK SPACE}% at the fitted temperature 1.25",
        "12.5\N{NO-BREAK SPACE}% without",
        "50 pairs",
    ):
        assert text in chart.note
    assert (
        reward_charts.draw_calibration({"calibration": MEASURES["calibration"] | {"reliability": []}}) == []
    )


def test_the_noise_floor_stands_beside_the_calibration_error() -> None:
    found = MEASURES["calibration"]
    [chart] = reward_charts.draw_calibration({"calibration": found | {"floor": 0.0375, "reason": ""}})
    assert (
        "A model that means exactly what it says would show 3.8\N{NO-BREAK SPACE}% on as many pairs, "
        "by chance alone." in chart.note
    )
    [chart] = reward_charts.draw_calibration({"calibration": found | {"reason": "no two rewards differ"}})
    assert "no temperature was fitted, because no two rewards differ" in chart.note


def test_what_an_answer_is_worth_elsewhere_is_told_with_the_attacks() -> None:
    elsewhere = {"value": 0.78125, "low": 0.75, "high": 0.8125, "n": 512}
    [panel] = reward_charts.build_panels({"attacks": MEASURES["attacks"], "elsewhere": elsewhere})
    assert "at its own and at a random other question correlate 0.781 (0.750 to 0.812)" in panel.note


def test_an_attack_whose_interval_holds_the_threshold_is_not_decided() -> None:
    attacks = {
        "echo": {"wins": wilson(12, 48)._asdict(), "failed": False},
        "empty": {"wins": wilson(0, 48)._asdict(), "failed": False},
    }
    [panel] = reward_charts.build_panels({"attacks": attacks})
    assert [bar.flag for bar in panel.groups[0][1]] == ["too few to tell", ""]


@pytest.mark.parametrize(
    ("split", "said"),
    [("evaluation", "on which nothing was trained or chosen"), ("held-out", "a little too good")],
)
def test_every_accuracy_says_which_questions_it_is_of(tmp_path: Path, split: str, said: str) -> None:
    run = make_run(tmp_path)
    measured = {"split": split, "questions": 1234, "pairs": 5678}
    for stage in ("reward", "dpo"):
        path = run.inputs[stage] / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"measured": measured}))
    (run.inputs["reward"] / "measures.json").write_text(json.dumps(MEASURES | {"measured": measured}))
    page = render_report(run)
    assert (
        page.count(said) == page.count("1,234") == 3
    )  # the reward model, DPO, and the reward model's own panel


def test_what_was_cut_stands_in_the_report_and_in_the_data_card(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    pages = [render_report(run), (run.artifact / "card.html").read_text(encoding="utf-8")]
    for page in pages:
        assert re.search(
            (
                r"<td>SFT <strong class=\"flag\">[^<]*much is cut</strong></td><td>0\.0\s%</td><td>–</td><td>"
                r"37\.5\s%</td><td>–</td>"
            ),
            page,
        )
    path = run.inputs["sft"] / "summary.json"
    told = json.loads(path.read_text())
    told["metrics"] = {"sft.perplexity": 1.5}
    path.write_text(json.dumps(told))  # as in artifacts of old
    assert "limits</h3>" not in render_report(run)


def test_samples_are_found_by_their_questions_ids(tmp_path: Path) -> None:
    """The evaluation split has questions that were not drawn, and is in another order."""
    run = make_run(tmp_path)
    path = run.inputs["data"] / "evaluation.parquet"
    table = pq.read_table(path)
    more = table.set_column(0, "question_id", pa.array([-1 - i for i in range(30)])).set_column(
        1, "prompt", pa.array(["another"] * 30)
    )
    before = render_report(run)
    pq.write_table(pa.concat_tables([more, table.take(list(range(29, -1, -1)))]), path)
    assert render_report(run) == before


def test_stages_without_pictures_share_a_place(tmp_path: Path) -> None:
    page = render_report(make_run(tmp_path))
    merge, reference = page.index("<h3>Merge"), page.index("<h3>Reference")
    assert merge < reference
    assert 'class="stage' not in page[merge:reference]


def test_ticks_are_round_and_inside() -> None:
    assert charts.choose_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.choose_ticks(-0.3, 4.9) == pytest.approx([0, 2, 4])
    assert charts.choose_ticks(120, 870) == pytest.approx([200, 400, 600, 800])


def test_a_long_curve_is_averaged_and_keeps_its_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(4000)]
    thinned = charts.average_down(points)
    assert len(thinned) == charts.MAX_POINTS
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(sum(y for _, y in points) / len(points))
    assert charts.moving_average([(float(i), 2.0) for i in range(100)])[0] == (0.0, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (-1.5, "−1.50"),
        (3e-7, "3.0e−7"),
        (123.44, "123.4"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize("stage", stage_panels.PANELS)
def test_every_panel_shows_a_metric_that_its_program_logs(stage: str) -> None:
    folder = ROOT / "tasks" / "programs"
    parts = [folder / f"{stage}.py", *sorted((folder / f"{stage}_stage").glob("*.py"))]
    program = "".join(path.read_text() for path in parts)
    if stage == "ppo":
        program += (ROOT / "tasks" / "rlhf" / "evaluation" / "text_statistics.py").read_text()
    if "loop.fit(" in program:
        program += (ROOT / "tasks" / "rlhf" / "training" / "loop.py").read_text()
    for panel in stage_panels.PANELS[stage]:
        for name in panel.metrics:
            assert re.search(rf"\b{name}=|\"{name}\"|^    {name}: float", program, re.MULTILINE), name


def test_the_template_and_its_style_are_packaged() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "tasks.reporting"
    ]
    for name in (TEMPLATE, STYLE, *PARTS):
        assert any(Path(name).match(pattern) for pattern in shipped)
        assert f"tasks/reporting/{name}" in source_digests("report")
