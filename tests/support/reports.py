"""Write made-up artifacts of every stage and data cards, and render the pages of both."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.config.jobs import ReportJob
from tasks.config.sections.data import Data
from tasks.programs.report import build_report
from tasks.programs.runtime.program import Run
from tasks.reporting import data_card
from tasks.rlhf.evaluation.intervals import mean_interval, wilson
from tasks.rlhf.judging.verdicts import Counts
from tasks.rlhf.judging.win_rate import win_rate

EVIL = '<script>alert("x")</script><!--stage-table--></pre><img src=x onerror=alert(1)>'

CURVES = {
    "pretrain": ("loss",),
    "sft": ("loss",),
    "reward": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy", "margin", "chosen_reward"),
    "ppo": (
        *(
            "reward",
            "kl",
            "kl_k3",
            "kl_coefficient",
            "entropy_estimate",
            "length",
            "ended",
            "policy_loss",
            "value_loss",
            "clip_fraction",
        ),
        *("approx_kl", "explained_variance", "skipped"),
    ),
}
LOOKS = ("sft", "reward", "dpo")  # stages that measure a held-out loss, every twentieth step
METRICS = {
    "site": {"site.posts": 90},
    "pretrain": {"pretrain.loss": 0.5},
    "sft": {
        "sft.prompts_cut": 0.0,
        "sft.answers_cut": 0.375,
        "sft.perplexity": 1.5,
        f"sft.{EVIL}": 2.0,
        "sft.best_step": 40,
        "sft.held_out_loss": 0.25,
    },
    "merge": {"merge.drift_max": 1e-5, "merge.top1_agreement": 1.0},
    "reference": {"reference.log_prob": -0.5},
    "reward": {
        "reward_accuracy.votes": wilson(80, 100)._asdict(),
        "reward_accuracy.longer_wins": wilson(60, 100)._asdict(),
    },
    "ppo": {"ppo.rollout_kl": 6.0},
    "dpo": {"dpo.implicit_accuracy": wilson(75, 100)._asdict()},
}
RATE = wilson(80, 100)._asdict()
JUDGES = {
    "gold": {"title": "the gold scorer", "about": EVIL},
    "reward": {"title": "the reward model", "about": f"An upper bound. {EVIL}"},
}
MEASURES: dict = {
    "accuracy": dict.fromkeys(
        ("votes", "gap_1", "gap_3_up", "longer_chosen", "longer_wins", "over_longer_wins"), RATE
    ),
    "calibration": {
        "temperature": 1.25,
        "before": 0.125,
        "after": 0.0625,
        "n": 50,
        "reliability": [{"confidence": 0.75, "accuracy": RATE}],
    },
    "attacks": {
        "empty": {"wins": wilson(0, 48)._asdict(), "failed": False},
        EVIL: {"wins": wilson(3, 48)._asdict(), "failed": False},
        "unrelated": {"wins": wilson(24, 48)._asdict(), "failed": True},
    },
}


def write_stage(folder: Path, metrics: dict, lines: list[dict] = [], **more) -> Path:  # noqa: B006 - never changed
    """Write a stage's summary and metrics."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics, "warnings": [EVIL], **more}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_run(
    root: Path,
    *,
    policies: tuple[str, ...] = ("dpo", "ppo"),
    without: tuple[str, ...] = (),
    gold: bool = True,
    site: str = "a.org",
    samples: bool = True,
) -> Run:
    """Write small artifacts of every stage, with hostile texts; return the run of a report on them."""
    rng = random.Random(0)
    inputs = {}
    for stage, metrics in METRICS.items():
        if stage in without or (stage in ("ppo", "dpo") and stage not in policies):
            continue
        lines = [
            {"step": i + 1, "total": 60, **{name: rng.random() for name in CURVES.get(stage, ())}}
            for i in range(60)
        ]
        for line in lines[19::20] if stage in LOOKS else ():
            line["held_out_loss"] = 0.25 + abs(line["step"] - 40) / 100
        inputs[stage] = write_stage(root / stage, metrics, lines)
    for stage in ("sft", *policies) if samples else ():
        if stage in inputs:
            write_samples(inputs[stage], stage)
    (inputs["reward"] / "measures.json").write_text(json.dumps(MEASURES))
    inputs["data"] = make_data(root / "data", site)
    inputs["winrate"] = make_winrate(root / "winrate", ["sft", *policies], gold)
    (root / "run").mkdir()
    job = {"stage": "report", "job": {}, "inputs": {name: str(path) for name, path in inputs.items()}}
    (root / "run" / "job.json").write_text(json.dumps(job))
    return Run(root / "run")


def write_samples(folder: Path, stage: str) -> None:
    """Write hostile answers to three questions at four steps; the second and third are the same."""
    lines = []
    for step, version in ((0, 0), (20, 1), (40, 1), (60, 2)):
        answers: list[dict[str, Any]] = [
            {
                "question_id": 7 * i,
                "question": f"question {i} {EVIL}\nand {EVIL}",
                "answer": f"{stage} answer {version} {EVIL}",
                "length": 20 + i,
                "ended": step != 60,
                "kl": step / 16 - 0.001,
            }
            for i in range(3)
        ]
        if stage == "ppo":
            answers = [answer | {"reward": -1.25} for answer in answers]
        lines.append(json.dumps({"step": step, "answers": answers}) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


def make_data(folder: Path, site: str) -> Path:
    """Write a data card and the table of held-out questions, with hostile texts."""
    write_stage(folder, {"data.pairs": 7})
    about = {"url": f"https://{site}/q/1", "author": EVIL, "author_name": EVIL, "licence": "CC BY-SA 4.0"}
    question = {f"question_{name}": value for name, value in about.items()}
    rows = [
        {
            "question_id": 7 * i,
            "prompt": f"{i} {EVIL}",
            "best": 1,
            **question,
            **{f"answer_{k}": ["", v] for k, v in about.items()},
        }
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "evaluation.parquet")
    pair = {"prompt": EVIL, "chosen": EVIL, "rejected": EVIL, "chosen_score": 3, "rejected_score": 0}
    pair |= question | {
        f"{role}_{name}": value for role in ("chosen", "rejected") for name, value in about.items()
    }
    bins = [{"from": 16, "below": 32, "count": 4}, {"from": 32, "below": 64, "count": 9}]
    kept = {"questions": 5, "answers": 13, "pairs": 7}
    card: dict = {
        "site": site,
        "kind": "stack-exchange",
        "quarantined": {},
        "masked": {"email": 3, EVIL: 1},
        "kept": kept,
        "questions_with_pairs": 4,
        "read": {"questions": 6, "answers": 14},
        "dropped": {EVIL: 1},
    }
    card |= {
        "scores": [{"score": -1, "count": 2}, {"score": 3, "count": 11}],
        "answer_chars": bins,
        "prompt_chars": bins,
    }
    card |= {"longer_wins": 0.65, "older_wins": 0.5, "licences": {"CC BY-SA 4.0": 18}, "examples": [pair]}
    card |= {
        "split_questions": {"finetune": 2, "evaluation": 1},
        "rows": {"finetune": 2, "evaluation": 1},
        "rows_seen": 21,
        "sites": {site: 5},
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def make_winrate(folder: Path, policies: list[str], gold: bool) -> Path:
    """Write random scores of every policy's answers, and the win rates that follow from them."""
    rng = random.Random(1)
    names = ["chosen", *policies]
    columns: dict[str, list] = {
        "question_id": [7 * i for i in range(30)],
        "question": [f"{i} {EVIL}" for i in range(30)],
    } | {f"{n}.answer": [f"{n} {EVIL}"] * 30 for n in names}
    metrics: dict = {}
    tallies, judges, boards = {}, [], {}
    for by in ("reward", "gold") if gold else ("reward",):
        scores = {n: [0.4 * place + rng.random() for _ in range(30)] for place, n in enumerate(names)}
        columns |= {f"{n}.{by}": values for n, values in scores.items()}
        for i, theirs in enumerate(names):
            for ours in names[i + 1 :]:
                outcomes = (np.sign(np.subtract(scores[ours], scores[theirs])) + 1) / 2
                tally = Counts.of(outcomes)._asdict() | {"flipped": 2}
                tallies[f"{by}.{ours}_vs_{theirs}"] = tally
                metrics[f"{by}_win_rate.{ours}_vs_{theirs}"] = win_rate(outcomes, np.arange(30))._asdict()
        for name in ("agreement", "longer_wins", "consistency", "kappa", "equal_length", "length_pull"):
            metrics[f"judge.{by}.{name}"] = RATE
        metrics[f"judge.{by}.longer_wins"] = wilson(60, 100)._asdict()
        metrics[f"judge.{by}.unparseable"] = 0.125
        judges.insert(0, {"name": by, **JUDGES[by], "worth": f"{by} {EVIL}"})
        boards[by] = [
            {"policy": name, "strength": RATE, "elo": 1000.0, "ranks": [0.5] * len(names)}
            for name in reversed(names)
        ]
    for name in policies[1:]:
        metrics |= {f"{name}.kl": mean_interval([5.0, 7.0])._asdict(), f"{name}.length": 20.0}
    write_stage(folder, metrics, questions=30)
    pq.write_table(pa.table(columns), folder / "samples.parquet")
    (folder / "results.json").write_text(
        json.dumps(
            {
                "tallies": tallies,
                "judges": judges,
                "leaderboard": boards,
                "policies": policies,
                "questions": 30,
            }
        )
    )
    return folder


def render_report(run: Run) -> str:
    """Run the report's program in this process; return its page."""
    build_report(ReportJob(), run)
    return (run.artifact / "report.html").read_text(encoding="utf-8")


PAIR: dict[str, Any] = {}
PAIR |= {"question_id": 71, "prompt": "Which line to take?\n\nI have *two* bags.", "site": "a.org"}
PAIR |= {"chosen": "The blue one.", "rejected": "Walk.", "chosen_score": 5, "rejected_score": 2}
PAIR |= {"question_url": "https://a.org/q/71", "question_author": "Ann", "question_licence": "CC BY-SA 4.0"}
PAIR |= {
    "chosen_url": "https://a.org/a/72",
    "chosen_author": "https://a.org/users/9",
    "chosen_licence": "CC BY-SA 3.0",
}
PAIR |= {"rejected_url": "https://a.org/a/73", "rejected_author": "Bo", "rejected_licence": "CC BY-SA 2.5"}
CARD: dict[str, Any] = {
    "kind": "stack-exchange",
    "site": "a.org, b.org",
    "sites": {"a.org": 2001, "b.org": 641},
    "read": {"questions": 2725, "answers": 5798},
    "rows_seen": 10_007,
    "dropped": {
        "post types other than question and answer": 1477,
        "questions without answers": 83,
        "answers whose question is missing": 2,
        "questions of the reward split without two differently scored answers": 494,
    },
    "quarantined": {"rows that cannot be read": 7},
    "rules": {
        "rl_share": 0.1,
        "max_pairs": 13,
        "duplicates": "together",
        "languages": [],
        "max_questions_per_author": None,
        "unheard_of": True,
    },
    "masked": {"email": 3137, "phone": 1213, "key": 0},
    "kept": {"questions": 2642, "answers": 5796, "pairs": 4032},
    "questions_with_pairs": 1437,
    "split_questions": {"evaluation": 344, "finetune": 928, "reward": 1104, "rl": 266},
    "rows": {
        "corpus": 2025,
        "evaluation": 344,
        "evaluation_pairs": 579,
        "finetune": 928,
        "reward": 1705,
        "reward_groups": 610,
        "rl": 266,
    },
    "scores": [{"score": -1, "count": 1021}, {"score": 3, "count": 4775}],
    "answer_chars": [{"from": 32, "below": 64, "count": 1796}, {"from": 1024, "below": 2048, "count": 4000}],
    "prompt_chars": [{"from": 128, "below": 256, "count": 2642}],
    "answers_per_question": [
        {"answers": 1, "count": 1205},
        {"answers": 4, "count": 1399},
        {"answers": 40, "count": 38},
    ],
    "gaps": [{"gap": 1, "count": 3070}, {"gap": 7, "count": 962}],
    "longer_wins": 0.676,
    "older_wins": 0.633,
    "licences": {"CC BY-SA 3.0": 8263, "CC BY-SA 4.0": 175},
    "examples": [PAIR],
}


def render_card(card: dict[str, Any], **more: Any) -> str:
    """Return the page of a data card."""
    return data_card.render(card, descriptions=Data.descriptions(), **more)


def make_card(**changes: Any) -> dict[str, Any]:
    """Return a data card in which every count is different, with some fields changed."""
    return copy.deepcopy(CARD) | changes
