"""The page of a run: what it says, and that no text of a model or a user becomes markup."""

import json
import random
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.programs.config import ReportJob
from tasks.programs.entry import Run
from tasks.programs.report import STYLE, TEMPLATE, report, verdict
from tasks.rlhf import charts, panels
from tasks.rlhf.intervals import mean_interval, wilson
from tasks.rlhf.judging import compare
from tasks.rlhf.markup import author, clip, link
from tasks.sources import sources_of

ROOT = Path(__file__).resolve().parents[1]

EVIL = '<script>alert("x")</script><!--stage-table--></pre><img src=x onerror=alert(1)>'
CURVES = {
    "pretrain": ("loss",),
    "sft": ("loss",),
    "reward": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy", "margin", "chosen_reward"),
    "ppo": (
        *("reward", "kl", "kl_k3", "kl_coefficient", "entropy_estimate", "length", "ended", "policy_loss", "value_loss", "clip_fraction"),
        *("approx_kl", "explained_variance", "skipped"),
    ),
}
METRICS = {
    "site": {"site.posts": 90},
    "pretrain": {"pretrain.loss": 0.5},
    "sft": {"sft.perplexity": 1.5, f"sft.{EVIL}": 2.0},
    "merge": {"merge.drift_max": 1e-5, "merge.top1_agreement": 1.0},
    "reward": {"reward_accuracy.votes": wilson(80, 100)._asdict(), "reward_accuracy.longer_wins": wilson(60, 100)._asdict()},
    "ppo": {"ppo.rollout_kl": 6.0},
    "dpo": {"dpo.implicit_accuracy": wilson(75, 100)._asdict()},
}


class Tags(HTMLParser):
    """Every opened tag with its attributes, and every closed one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.opened.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def put(folder: Path, metrics: dict, lines: list[dict] = [], **more) -> Path:  # noqa: B006 - never changed
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics, "warnings": [EVIL], **more}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_run(root: Path, *, policies: tuple[str, ...] = ("dpo", "ppo"), without: tuple[str, ...] = (), gold: bool = True, site: str = "a.org") -> Run:
    """Small made-up artifacts of every stage, all texts hostile, and the report's run on them."""
    rng = random.Random(0)
    inputs = {}
    for stage, metrics in METRICS.items():
        if stage in without or (stage in ("ppo", "dpo") and stage not in policies):
            continue
        lines = [{"step": i + 1, "total": 60, **{name: rng.random() for name in CURVES.get(stage, ())}} for i in range(60)]
        inputs[stage] = put(root / stage, metrics, lines)
    inputs["data"] = make_data(root / "data", site)
    inputs["winrate"] = make_winrate(root / "winrate", ["sft", *policies], gold)
    (root / "run").mkdir()
    job = {"stage": "report", "job": {}, "inputs": {name: str(path) for name, path in inputs.items()}}
    (root / "run" / "job.json").write_text(json.dumps(job))
    return Run(root / "run")


def make_data(folder: Path, site: str) -> Path:
    put(folder, {"data.pairs": 7})
    about = {"url": f"https://{site}/q/1", "author": EVIL, "author_name": EVIL, "licence": "CC BY-SA 4.0"}
    question = {f"question_{name}": value for name, value in about.items()}
    rows = [{"prompt": f"{i} {EVIL}", "best": 1, **question, **{f"answer_{k}": ["", v] for k, v in about.items()}} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation.parquet")
    pair = {"prompt": EVIL, "chosen": EVIL, "rejected": EVIL, "chosen_score": 3, "rejected_score": 0}
    pair |= question | {f"{role}_{name}": value for role in ("chosen", "rejected") for name, value in about.items()}
    bins = [{"from": 16, "below": 32, "count": 4}, {"from": 32, "below": 64, "count": 9}]
    kept = {"questions": 5, "answers": 13, "pairs": 7}
    card: dict = {
        "site": site,
        "kind": "stack-exchange",
        "quarantined": {},
        "kept": kept,
        "questions_with_pairs": 4,
        "read": {"questions": 6, "answers": 14},
        "dropped": {EVIL: 1},
    }
    card |= {"scores": [{"score": -1, "count": 2}, {"score": 3, "count": 11}], "answer_chars": bins, "prompt_chars": bins}
    card |= {"longer_wins": 0.65, "older_wins": 0.5, "licences": {"CC BY-SA 4.0": 18}, "examples": [pair]}
    card |= {"split_questions": {"finetune": 2, "evaluation": 1}, "rows": {"finetune": 2, "evaluation": 1}, "rows_seen": 21, "sites": {site: 5}}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def make_winrate(folder: Path, policies: list[str], gold: bool) -> Path:
    rng = random.Random(1)
    names = ["chosen", *policies]
    columns: dict[str, list] = {"question": [f"{i} {EVIL}" for i in range(30)]} | {f"{n}.answer": [f"{n} {EVIL}"] * 30 for n in names}
    metrics: dict = {}
    tallies = {}
    for by in ("reward", "gold") if gold else ("reward",):
        scores = {n: [0.4 * place + rng.random() for _ in range(30)] for place, n in enumerate(names)}
        columns |= {f"{n}.{by}": values for n, values in scores.items()}
        for i, theirs in enumerate(names):
            for ours in names[i + 1 :]:
                tally = compare(scores[ours], scores[theirs])
                tallies[f"{by}.{ours}_vs_{theirs}"] = tally._asdict()
                metrics[f"{by}_win_rate.{ours}_vs_{theirs}"] = tally.win_rate._asdict()
    for name in policies[1:]:
        metrics |= {f"{name}.kl": mean_interval([5.0, 7.0])._asdict(), f"{name}.length": 20.0}
    put(folder, metrics, questions=30)
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    (folder / "results.json").write_text(json.dumps({"tallies": tallies, "policies": policies, "questions": 30}))
    return folder


def page_of(run: Run) -> str:
    report(ReportJob(), run)
    return (run.artifact / "report.html").read_text(encoding="utf-8")


def test_no_text_of_a_model_a_user_or_a_label_becomes_markup(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    tags = Tags(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img", "iframe", "object", "link"}
    assert not [name for _, attributes in tags.opened for name in attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") >= 12 * 4


def test_the_marker_stands_there_once(tmp_path: Path) -> None:
    assert page_of(make_run(tmp_path)).count("<!--stage-table-->") == 1


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    links = [attributes for tag, attributes in Tags(page).opened if tag == "a"]
    assert {"https://a.org/q/1", "https://a.org"} <= {attributes["href"] for attributes in links}
    without_links = re.sub(r'<a href="[^"]*"', "<a", page)
    assert "http:" not in without_links
    assert "https:" not in without_links
    assert not re.search(r"url\(|@import|\bsrc=", without_links.replace("src=x", ""))


def test_equal_artifacts_give_equal_bytes(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "here"), make_run(tmp_path / "there")
    page = page_of(first)
    (second.directory / "metrics.jsonl").write_text('{"step": 1, "total": 1, "time": 5}\n')
    assert page_of(second) == page
    assert [(first.artifact / n).read_bytes() for n in ("metrics.jsonl", "summary.json")] == [
        (second.artifact / n).read_bytes() for n in ("metrics.jsonl", "summary.json")
    ]
    assert str(tmp_path) not in page


@pytest.mark.parametrize("policies", [("ppo",), ("dpo",), ("dpo", "ppo"), ()])
@pytest.mark.parametrize("without", [(), ("site", "pretrain")])
def test_a_run_without_some_stages_has_a_page_without_their_parts(tmp_path: Path, policies: tuple[str, ...], without: tuple[str, ...]) -> None:
    page = page_of(make_run(tmp_path, policies=policies, without=without))
    assert ("<h3>Base model" in page) == ("pretrain" not in without)
    for name in ("PPO", "DPO"):
        assert (f"<h3>{name} <small>60 steps" in page) == (name.lower() in policies)
        assert (f"{name} against SFT" in page) == (name.lower() in policies)


def test_the_headline_names_the_best_policy_and_its_judge(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert re.search(r"<h1>PPO beats SFT, winning 100\.0\s% of the comparisons</h1>", page)
    assert "30 held-out questions, judged by the gold scorer" in page


def test_without_a_gold_scorer_the_page_says_how_little_the_reward_model_proves(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, gold=False))
    assert "judged by the reward model" in page
    assert "upper bound" in page
    assert "gold score" not in page


def test_a_site_that_does_not_exist_is_not_linked(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, site="shell.example"))
    assert "https://shell.example" not in page
    assert "is invented" in page


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.51, 0.6, "beats"), (0.3, 0.49, "loses to"), (0.4, 0.6, "is level with"), (0.5, 0.7, "is level with")]
)
def test_a_verdict_needs_the_whole_interval_on_one_side(low: float, high: float, said: str) -> None:
    assert verdict({"low": low, "high": high}) == said


def test_only_web_addresses_become_links() -> None:
    assert link("javascript:name/1", "x") == "x"
    assert link("//a.org/1", "x") == "x"
    assert link("https://shell.example/q/1", "x") == "x"
    assert 'href="https://a.org/?a=&#34;&gt;"' in link('https://a.org/?a=">', "x")
    assert "&lt;b&gt;" in link("https://a.org/q/1", "<b>")


def test_an_author_without_a_name_is_a_linked_profile() -> None:
    assert author("https://a.org/users/9") == '<a href="https://a.org/users/9" rel="noreferrer">user 9</a>'
    assert author("https://shell.example/users/9") == "user 9"
    assert author("Ann of https://a.org/users/9") == "Ann of https://a.org/users/9"


def test_a_long_text_is_cut_and_says_so() -> None:
    assert clip("a" * 1500, 1500) == "a" * 1500
    assert clip("a" * 3600, 1500) == "a" * 1500 + " … (2,100 more characters)"


def test_labels_of_charts_are_escaped() -> None:
    drawings = [
        charts.curves([charts.Curve("<b>", [(1, 1), (2, 3)])], title="<i>"),
        charts.columns([("<b>", 3)], title="<i>", unit="<u>"),
        charts.share_bar([('"><b>', 0.5)], value=0.5, low=0.4, high=0.6, title="<i>"),
    ]
    for drawing in drawings:
        assert not {tag for tag, _ in Tags(drawing).opened} & {"b", "i", "u"}


def test_curves_live_with_nothing_one_value_and_what_is_no_number() -> None:
    assert charts.curves([], title="") == ""
    assert charts.curves([charts.Curve("a", [(1, float("nan"))])], title="") == ""
    for points in ([(1, 0.0)], [(1, 5.0), (2, 5.0)], [(1, float("inf")), (2, -1.0), (3, -2e9)]):
        assert not re.search("nan|inf", charts.curves([charts.Curve("a", points)], title=""))


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(-0.3, 4.9) == pytest.approx([0, 2, 4])
    assert charts.ticks(120, 870) == pytest.approx([200, 400, 600, 800])


def test_a_long_curve_is_averaged_and_keeps_its_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(4000)]
    thinned = charts.thin(points)
    assert len(thinned) == charts.MOST_POINTS
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(sum(y for _, y in points) / len(points))
    assert charts.moving_average([(float(i), 2.0) for i in range(100)])[0] == (0.0, 2.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12345, "12,345"), (0.12345, "0.123"), (-1.5, "−1.50"), (3e-7, "3.0e−7"), (123.44, "123.4"), (float("nan"), "–"), (None, "–")],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert panels.number(value) == text


@pytest.mark.parametrize("stage", panels.PANELS)
def test_every_panel_shows_a_metric_that_its_program_logs(stage: str) -> None:
    program = (ROOT / "tasks" / "programs" / f"{stage}.py").read_text()
    for panel in panels.PANELS[stage]:
        for name in panel.metrics:
            assert re.search(rf"\b{name}=|\"{name}\"", program), name


def test_the_template_and_its_style_are_packaged() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tasks.programs"]
    for name in (TEMPLATE, STYLE):
        assert any(Path(name).match(pattern) for pattern in shipped)
        assert f"tasks/programs/{name}" in sources_of("report")
