"""Test the comparison of runs: joined battles, symmetry, paired differences, and what is shared."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from tasks.config.commands.comparison import ComparedRun, CompareJob, ComparingJudge, Comparison
from tasks.judges.judge import Battle, ReportProgress
from tasks.judges.scoring_judge import Asked, ScoringJudge
from tasks.programs import compare as program
from tasks.programs.comparison import run_answers
from tasks.programs.comparison.run_answers import Contestant
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.pages.html_tags import Tags

N = 300
SHARE_BETTER = {"good": 0.8, "plain": 0.5}  # of right answers
EVIL = '<script>alert("x")</script>'
JUDGE = ComparingJudge(name="gold", title="the gold scorer", identity="gold", card={})


def answers_of(share: float, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [("right " if rng.random() < share else "wrong ") + "x" * rng.randint(1, 30) for _ in range(N)]


def write_run(folder: Path, name: str, ppo: Sequence[str], *, text: str = "question") -> dict[str, Path]:
    """Write what a run has left: answers of SFT and PPO, and the verdicts between them."""
    sft, ids = answers_of(0.3, 1), list(range(N))
    columns: dict[str, Any] = {"question_id": ids, "question": [f"{text} {EVIL} {id}" for id in ids]}
    for policy, texts in (("sft", sft), ("ppo", list(ppo))):
        columns |= {
            f"{policy}.answer": texts,
            f"{policy}.tokens": [[1]] * N,
            f"{policy}.kl": [len(one) / 10 for one in texts],
        }
    outcomes = [_outcome(ours, theirs) for ours, theirs in zip(ppo, sft, strict=True)]
    verdicts = {
        "judge": ["gold"] * N,
        "ours": ["ppo"] * N,
        "theirs": ["sft"] * N,
        "question_id": ids,
        "outcome": outcomes,
    }
    for stage, file, table in (("answers", "answers", columns), ("winrate", "verdicts", verdicts)):
        (folder / name / stage).mkdir(parents=True)
        pq.write_table(pa.table(table), folder / name / stage / f"{file}.parquet")
    return {stage: folder / name / stage for stage in ("answers", "winrate")}


def _outcome(ours: str, theirs: str) -> float:
    return (1 + ours.startswith("right") - theirs.startswith("right")) / 2


def described(name: str, policies: tuple[str, ...] = ("sft", "ppo")) -> ComparedRun:
    rate = {"value": 0.6, "low": 0.5, "high": 0.7, "n": N}
    return ComparedRun(
        run_id=name,
        name=f"demo {name} {EVIL}",
        settings={"ppo.steps": name},
        metrics={"gold_win_rate.ppo_vs_sft": rate},
        warnings=(EVIL,),
        judges={"gold": "gold"},
        policies=policies,
    )


def score(asked: Sequence[Asked], report_progress: ReportProgress) -> list[float]:
    del report_progress
    return [float(answer.text.startswith("right")) for _, answer in asked]


@pytest.fixture(autouse=True)
def planted_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a judge decide that knows which answers are right."""
    judge = ScoringJudge("gold", "the gold scorer", "It knows.", score=score)
    monkeypatch.setattr(program, "load_judge", lambda *_: (judge, None))


def run_program(
    folder: Path, places: Sequence[dict[str, Path]], *, judged_by: ComparingJudge | None = JUDGE
) -> tuple[dict[str, Any], str]:
    """Compare runs whose artifacts lie in these folders; return results.json and the page."""
    inputs = {
        f"{stage}{number}": str(path)
        for number, place in enumerate(places, start=1)
        for stage, path in place.items()
    }
    runs = tuple(described(place["answers"].parent.name) for place in places)
    job = CompareJob.of(Comparison(runs=runs, judged_by=judged_by))
    folder.mkdir(parents=True)
    record = {"stage": "compare", "job": job.model_dump(mode="json"), "inputs": inputs}
    (folder / "job.json").write_text(json.dumps(record))
    run = Run(folder)
    program.compare(job, run)
    page = (run.artifact / "comparison.html").read_text(encoding="utf-8")
    return json.loads((run.artifact / "results.json").read_text()), page


@pytest.fixture
def places(tmp_path: Path) -> dict[str, dict[str, Path]]:
    return {
        name: write_run(tmp_path, name, answers_of(share, seed))
        for seed, (name, share) in enumerate(SHARE_BETTER.items(), start=2)
    }


def test_golden(tmp_path: Path, places: dict[str, dict[str, Path]]) -> None:
    results, _ = run_program(tmp_path / "job", [places["good"], places["plain"]])
    judged = results["judged"]
    assert [(one["title"], round(one["elo"], 2)) for one in judged["board"]] == GOLDEN_BOARD
    assert [
        (one["ours"], one["theirs"], *(round(one["rate"][part], 6) for part in ("value", "low", "high")),
         tuple(one["tally"].values()))
        for one in judged["battles"]
    ] == GOLDEN_BATTLES  # fmt: skip


GOLDEN_BOARD = [("PPO of A", 1211.43), ("PPO of B", 965.76), ("SFT of A and B", 822.81)]
# rates, normal intervals and counts were computed from the texts by hand
GOLDEN_BATTLES = [
    ("PPO of A", "PPO of B", 0.651667, 0.615087, 0.688246, (122, 147, 31, 0)),
    ("PPO of A", "SFT of A and B", 0.74, 0.705914, 0.774086, (161, 122, 17, 0)),
    ("PPO of B", "SFT of A and B", 0.588333, 0.55114, 0.625526, (96, 161, 43, 0)),
]


def test_a_better_policy_wins_and_the_interval_holds_the_truth(
    tmp_path: Path, places: dict[str, dict[str, Path]]
) -> None:
    results, page = run_program(tmp_path / "job", [places["plain"], places["good"]])
    judged = results["judged"]
    assert [one["title"] for one in judged["board"]] == ["PPO of B", "PPO of A", "SFT of A and B"]
    assert judged["board"][0]["ranks"][0] > 0.99
    battle = judged["battles"][0]
    assert (battle["ours"], battle["theirs"]) == ("PPO of B", "PPO of A")
    truth = 0.5 + (SHARE_BETTER["good"] - SHARE_BETTER["plain"]) / 2
    assert 0.5 < battle["rate"]["low"] < truth < battle["rate"]["high"]
    assert "PPO of B is first" in judged["sentences"][0]
    assert judged["sentences"][0].endswith("of 300 questions by the gold scorer: shown to be better.")
    assert "<h1>PPO of B beats PPO of A</h1>" in page


def test_the_order_of_the_runs_changes_names_only(tmp_path: Path, places: dict[str, dict[str, Path]]) -> None:
    one, _ = run_program(tmp_path / "one", [places["good"], places["plain"]])
    other, _ = run_program(tmp_path / "other", [places["plain"], places["good"]])
    swapped = str.maketrans("AB", "BA")
    for first, second in zip(one["judged"]["board"], other["judged"]["board"], strict=True):
        if first["title"] != "SFT of A and B":
            assert first["title"].translate(swapped) == second["title"]
        assert first["strength"] == pytest.approx(second["strength"])
        assert first["ranks"] == second["ranks"]
    for first, second in zip(one["judged"]["battles"], other["judged"]["battles"], strict=True):
        assert first["rate"] == pytest.approx(second["rate"])
        assert first["tally"] == second["tally"]


def test_a_run_compared_with_itself_is_a_tie(tmp_path: Path, places: dict[str, dict[str, Path]]) -> None:
    results, _ = run_program(tmp_path / "job", [places["good"], places["good"]])
    ties = [one for one in results["judged"]["battles"] if one["theirs"] == "PPO of B"]
    assert [(one["ours"], one["rate"]["value"], one["tally"]["ties"]) for one in ties] == [
        ("PPO of A", 0.5, N)
    ]
    assert [one["title"] for one in results["judged"]["board"]] == ["PPO of A and B", "SFT of A and B"]
    assert results["differences"] == []
    assert results["sentences"] == [
        "All runs answered the same 300 questions.",
        "These gave the same answers: SFT of A and B; PPO of A and B.",
    ]


def test_differences_are_those_of_a_paired_t_interval(
    tmp_path: Path, places: dict[str, dict[str, Path]]
) -> None:
    results, _ = run_program(tmp_path / "job", [places["good"], places["plain"]], judged_by=None)
    assert results["judged"] is None
    outcomes = [
        np.array(pq.read_table(places[name]["winrate"] / "verdicts.parquet")["outcome"].to_pylist())
        for name in ("good", "plain")
    ]
    interval = stats.ttest_rel(*outcomes).confidence_interval()
    found = {one["figure"]: one for one in results["differences"]}
    rate = found["win rate against SFT"]
    assert rate["estimate"]["low"] == pytest.approx(100 * interval.low)
    assert rate["estimate"]["high"] == pytest.approx(100 * interval.high)
    assert (rate["first"], rate["second"], rate["verdict"]) == ("A", "B", "higher")
    assert found["length"]["estimate"]["value"] == pytest.approx(
        10 * found["KL from SFT"]["estimate"]["value"]
    )
    assert "win rate against SFT shown to be higher" in results["sentences"][-1]
    assert "not shown to differ" in results["sentences"][-1]
    results, _ = run_program(tmp_path / "turned", [places["plain"], places["good"]], judged_by=None)
    turned = {one["figure"]: one["verdict"] for one in results["differences"]}
    assert turned == {"win rate against SFT": "lower", "KL from SFT": "not shown", "length": "not shown"}


def test_another_judge_s_win_rates_are_not_subtracted(
    tmp_path: Path, places: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        globals(), "described", lambda name: _described(name).model_copy(update={"judges": {"gold": name}})
    )
    results, _ = run_program(tmp_path / "job", [places["good"], places["plain"]], judged_by=None)
    assert [one["figure"] for one in results["differences"]] == ["KL from SFT", "length"]
    assert any(sentence.startswith("Different judges judged the runs") for sentence in results["sentences"])


_described = described


def test_questions_with_equal_ids_and_other_texts_are_not_shared(
    tmp_path: Path, places: dict[str, dict[str, Path]]
) -> None:
    other = write_run(tmp_path, "other", answers_of(0.5, 9), text="another question")
    results, _ = run_program(tmp_path / "job", [places["good"], other], judged_by=None)
    assert (results["shared"], results["differences"]) == (0, [])
    assert results["sentences"] == [
        "The runs share no question, so their figures are of different questions."
    ]
    with pytest.raises(InputError, match="share no held-out question"):
        run_program(tmp_path / "judged", [places["good"], other])


def test_no_text_becomes_markup(tmp_path: Path, places: dict[str, dict[str, Path]]) -> None:
    evil = write_run(tmp_path, "evil", [f"right {EVIL}"] * N)
    for name, judge in (("judged", JUDGE), ("own", None)):
        _, page = run_program(tmp_path / name, [places["good"], evil], judged_by=judge)
        tags = Tags(page)
        assert tags.open == []
        assert not {tag for tag, _ in tags.opened} & {"script", "img", "link"}
        assert tags.text.count(f"right {EVIL}") == 12
        assert "http:" not in page


def test_tokens_of_another_tokenizer_are_found_out(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    texts = ["list files"] * N
    folder = write_run(tmp_path, "run", texts)["answers"]
    found = run_answers.read_answers(folder)
    job = CompareJob.of(Comparison(runs=(described("a"), described("b"))))
    assert not program.has_tokens_of(tokenizer, job, found, "ppo", [0, 1])
    tokens = tokenizer.encode(" list files", add_special_tokens=False)
    for id, answer in found.answers["ppo"].items():
        found.answers["ppo"][id] = answer._replace(ids=[*tokens, tokenizer.eos_token_id])
    assert program.has_tokens_of(tokenizer, job, found, "ppo", [0, 1])
    questions = run_answers.build_questions([Contestant(0, "ppo")], [found], [0], own_tokens=False)
    assert questions[0].answers["ppo1"].ids is None
    found.answers["ppo"][1] = found.answers["ppo"][1]._replace(ids=[len(tokenizer)])
    assert not program.has_tokens_of(tokenizer, job, found, "ppo", [0, 1])


def test_a_battle_is_judged_once_for_equal_answers(
    tmp_path: Path, places: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Battle] = []

    class Counting(ScoringJudge):
        def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> Any:
            asked.extend(battles)
            return super().compare(battles, report_progress)

    judge = Counting("gold", "the gold scorer", "It knows.", score=score)
    monkeypatch.setattr(program, "load_judge", lambda *_: (judge, None))
    run_program(tmp_path / "job", [places["good"], places["plain"]])
    assert len(asked) == 3 * 2 * N  # PPO of A, PPO of B and the one SFT, in both orders
