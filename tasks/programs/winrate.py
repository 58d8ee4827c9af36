"""Grade judges on held-out votes, let them decide between the policies' answers, and count wins.

python -m tasks.programs.winrate DIR

inputs: data, model (the merged SFT model), reward, answers
artifact: samples.parquet   questions, answers and scores side by side
          verdicts.parquet  each judge's verdict on every battle, in both orders
          results.json      judges with their report cards, counts, leaderboards
          summary.json

Judges are the gold scorer (on the built-in site), a language model (if the settings name one) and the reward
model: ``job_judges`` makes them.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.config.jobs import WinrateJob
from tasks.config.policies import COMPARED
from tasks.config.trusted_judges import is_trusted
from tasks.dataset import row_sample
from tasks.judges.judge import Answer, Judge
from tasks.judges.scoring_judge import ScoringJudge
from tasks.programs.runtime import battles, pair_tables, table_rows
from tasks.programs.runtime.battles import Question
from tasks.programs.runtime.job_judges import limits, load_judges, refuse_unaffordable
from tasks.programs.runtime.program import Run, main, to_json
from tasks.rlhf.compute import devices
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.gold_agreement import ordering_agreement
from tasks.rlhf.judging.judge_correction import Graded
from tasks.rlhf.judging.report_card import ReportCard
from tasks.rlhf.models import loading


def evaluate(job: WinrateJob, run: Run) -> None:
    """Judge every pair of policies, among which are the writers of the chosen answers."""
    # 1. Questions with all their answers, and the judges. A killed program starts over.
    run.rewind(0)
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    chats = table_rows.read_chats(run.inputs["data"] / "evaluation.parquet")
    encoder = pair_tables.build_encoder(job.text, tokenizer, chats)
    questions, policies = read_questions(run.inputs["answers"], run.inputs["data"] / "evaluation.parquet")
    judges = load_judges(job, run, encoder, device)

    # 2. What each judge is worth: its verdicts on pairs that voters have ordered.
    graded, judged = {}, {}
    for judge in judges:
        num_questions, num_pairs = limits(judge, job)
        pairs = read_pairs(run.inputs["data"] / "evaluation_pairs.parquet", num_pairs)
        some = draw_questions(questions, num_questions)
        asked = [*battles.voted_battles(pairs), *battles.policy_battles(some, policies)]
        refuse_unaffordable(judge, battles.in_both_orders(asked))
        if pairs:
            graded[judge.name] = battles.grade(judge, pairs, run)

        # 3. Every judge's verdicts on every pair of policies.
        judged[judge.name] = battles.judge_all(judge, some, policies, run)
    metrics = {} if not graded else _card_metrics({name: card for name, (card, _) in graded.items()})
    for name, found in judged.items():
        votes = graded[name][1] if name in graded and name != "gold" else None  # which is the truth itself
        metrics |= battles.rate_metrics(name, found, votes)
    scores = {judge.name: _scores(judge, questions, policies, run) for judge in judges}
    metrics |= _score_metrics(scores)
    if "gold" in judged:
        metrics["reward_accuracy.gold"] = _gold_agreement(judges, questions, run)._asdict()

    # 4. The artifact.
    write_samples(run.artifact / "samples.parquet", questions, policies, scores)
    pq.write_table(battles.verdict_table(judged), run.artifact / "verdicts.parquet")
    results = {
        "policies": [name for name in policies if name != "chosen"],
        "questions": len(questions),
        "judges": [_describe(judge, graded) for judge in _by_trust(judges, metrics)],
        "tallies": {key: counts for name, found in judged.items() for key, counts in found.counts(name)},
        "leaderboard": {name: battles.leaderboard(found, policies) for name, found in judged.items()},
    }
    (run.artifact / "results.json").write_text(to_json(results, indent=1))
    run.warnings += [*encoder.warnings(), *(text for judge in judges for text in judge.warnings())]
    run.finish(metrics | encoder.metrics("winrate"), questions=len(questions))


def read_questions(answers: Path, evaluation: Path) -> tuple[list[Question], list[str]]:
    """Return the answered questions with everyone's answers, and the names of the policies.

    "chosen" is the best voted answer of the evaluation split.
    """
    table = pq.read_table(answers / "answers.parquet")
    names = [name for name in COMPARED if f"{name}.answer" in table.column_names]
    voted = pq.read_table(evaluation, columns=["question_id", "answers", "best"])
    split = {row["question_id"]: row for row in voted.to_pylist()}
    questions = []
    for row in table.to_pylist():
        source = split[row["question_id"]]
        given = {"chosen": Answer(source["answers"][source["best"]])}
        given |= {name: Answer(row[f"{name}.answer"], row[f"{name}.tokens"]) for name in names}
        questions.append(Question(row["question_id"], row["question"], given, source["answers"]))
    return questions, ["chosen", *names]


def draw_questions(questions: list[Question], count: int) -> list[Question]:
    """Return at most ``count`` of the questions, drawn by their ids, in their order."""
    places = row_sample.draw_sample([one.id for one in questions], count)
    return [questions[place] for place in sorted(places)]


def read_pairs(path: Path, count: int) -> list[dict[str, Any]]:
    """Return at most ``count`` pairs of the evaluation split, drawn by their questions."""
    if not path.exists():
        return []
    table = pq.read_table(path, columns=["question_id", "prompt", "chosen", "rejected"])
    places = row_sample.draw_sample(table["question_id"].to_pylist(), count)
    rows: list[dict[str, Any]] = table.take(sorted(places)).to_pylist()
    return rows


def _scores(judge: Judge, questions: list[Question], policies: list[str], run: Run) -> dict[str, list[float]]:
    """Return a scoring judge's scores of each policy's answers; none for other judges."""
    if not isinstance(judge, ScoringJudge):
        return {}
    return {
        name: judge.scores([(one.text, one.answers[name]) for one in questions], run.phase(f"scoring {name}"))
        for name in policies
    }


def _score_metrics(scores: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    return {
        f"{judge}_score.{name}": sum(values) / len(values)
        for judge, by_policy in scores.items()
        for name, values in by_policy.items()
    }


def _card_metrics(cards: dict[str, ReportCard]) -> dict[str, Any]:
    return {
        f"judge.{name}.{field}": value._asdict() if isinstance(value, Interval) else value
        for name, card in cards.items()
        for field, value in card._asdict().items()
    }


def _by_trust(judges: list[Judge], metrics: dict[str, Any]) -> list[Judge]:
    """Return the judges with those first that their report cards do not doubt."""
    return sorted(judges, key=lambda judge: not is_trusted(judge.name, metrics))


def _describe(judge: Judge, graded: dict[str, tuple[ReportCard, Graded]]) -> dict[str, str]:
    return {
        "name": judge.name,
        "title": judge.title,
        "about": judge.about,
        "worth": battles.describe_card(judge, graded[judge.name][0]) if judge.name in graded else "",
    }


def _gold_agreement(judges: list[Judge], questions: list[Question], run: Run) -> Interval:
    """Return how often the reward model orders two held-out answers to a question as the gold scorer does."""
    orders: dict[str, list[list[float]]] = {}
    for judge in judges:
        if isinstance(judge, ScoringJudge) and judge.name in ("gold", "reward"):
            asked = [(one.text, Answer(text)) for one in questions for text in one.voted]
            scores = iter(judge.scores(asked, run.phase("scoring all answers")))
            orders[judge.name] = [[next(scores) for _ in one.voted] for one in questions]
    return ordering_agreement(orders["reward"], orders["gold"])


def write_samples(
    path: Path,
    questions: list[Question],
    policies: list[str],
    scores: dict[str, dict[str, list[float]]],
) -> None:
    """Write questions, every policy's answers and every judge's scores side by side."""
    columns: dict[str, list[Any]] = {
        "question_id": [one.id for one in questions],
        "question": [one.text for one in questions],
    }
    columns |= {f"{name}.answer": [one.answers[name].text for one in questions] for name in policies}
    for judge, by_policy in scores.items():
        columns |= {f"{name}.{judge}": values for name, values in by_policy.items()}
    pq.write_table(pa.table(columns), path)


if __name__ == "__main__":
    main(evaluate, WinrateJob)
