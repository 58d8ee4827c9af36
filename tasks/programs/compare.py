"""Compare finished runs: the figures of each, question by question, and verdicts between their policies.

python -m tasks.programs.compare DIR

inputs: of each run answers1, winrate1 and benchmarks1, ...; and those of the judge, if one decides
artifact: results.json      a line per policy, differences, sentences; with a judge leaderboard and battles
          comparison.html   the same as a page, with answers side by side
          verdicts.parquet  the judge's verdict on every battle, in both orders
          summary.json

No answers are sampled. Policies that gave the same answers are one contestant, which no judge compares with
itself.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from tasks.config.commands.comparison import CompareJob
from tasks.config.sections.judges import NoJudge
from tasks.dataset import row_sample
from tasks.judges.gold_judge import gold_judge
from tasks.judges.judge import Judge
from tasks.judges.scoring_judge import ScoringJudge
from tasks.programs.comparison import differences, leaderboard, run_answers, standings
from tasks.programs.comparison.differences import Tables
from tasks.programs.comparison.run_answers import Contestant, RunAnswers
from tasks.programs.comparison.standings import LETTERS
from tasks.programs.runtime import battles, job_judges, language_judges, pair_tables, table_rows
from tasks.programs.runtime.program import Run, main, to_json
from tasks.reporting import comparison_page
from tasks.rlhf.batches import prompts
from tasks.rlhf.compute import devices
from tasks.rlhf.models import loading
from tasks.system.errors import InputError


def compare(job: CompareJob, run: Run) -> None:
    """Compare the runs of the job."""
    # 1. What is stored of each run's answers. A killed program starts over.
    run.rewind(0)
    tables = read_tables(job, run)
    answers = [table.answers for table in tables]
    ids = run_answers.shared_questions(answers)
    policies = [Contestant(number, policy) for number, one in enumerate(job.runs) for policy in one.policies]

    # 2. The figures of each run, and their differences from those of the run that is best by them.
    rows = standings.build_rows(job.runs)
    best = LETTERS.index(rows[0]["run"]) if rows else 0
    others = [number for number in range(len(job.runs)) if number != best]
    found = [one for other in others for one in differences.compare_runs(best, other, tables)]

    # 3. One judge's verdicts on the answers of all policies.
    judged, metrics = judge_policies(job, run, answers, ids, policies) if job.judged_by else (None, {})

    # 4. The artifact.
    results = {
        "runs": [describe_run(job, number) for number in range(len(job.runs))],
        "shared": len(ids),
        "rows": rows,
        "differences": found,
        "sentences": [
            *standings.describe_terms(job.runs, answers),
            *(leaderboard.describe_equal(run_answers.group_equal(policies, answers, ids)) if ids else []),
            *differences.describe_differences(found),
        ],
        "judged": judged,
    }
    (run.artifact / "results.json").write_text(to_json(results, indent=1))
    samples = build_samples(answers, ids, policies)
    (run.artifact / "comparison.html").write_bytes(comparison_page.render(results, samples))
    run.log(1, 1)
    run.finish({"compare.shared_questions": len(ids), **metrics})


def read_tables(job: CompareJob, run: Run) -> list[Tables]:
    """Return what each run's artifacts say of single questions."""
    found = []
    for number in range(1, len(job.runs) + 1):
        winrate, benchmarks = (run.inputs.get(f"{stage}{number}") for stage in ("winrate", "benchmarks"))
        answers = run_answers.read_answers(run.inputs[f"answers{number}"])
        verdicts = differences.read_verdicts(winrate) if winrate else None
        losses = pq.read_table(benchmarks / "perplexity.parquet").to_pydict() if benchmarks else None
        found.append(Tables(job.runs[number - 1], answers, verdicts, losses))
    return found


def describe_run(job: CompareJob, number: int) -> dict[str, Any]:
    """Return what the page and the terminal say of a run."""
    one = job.runs[number]
    facts = one.model_dump(include={"run_id", "name", "settings", "warnings"})
    return {"letter": LETTERS[number], **facts}


def judge_policies(
    job: CompareJob, run: Run, answers: Sequence[RunAnswers], ids: list[int], policies: Sequence[Contestant]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the leaderboard with all battles, and their metrics. Raises InputError."""
    assert job.judged_by
    if not ids:
        raise InputError("The runs share no held-out question, so no judge can decide between their answers")
    judge, tokenizer = load_judge(job, run)
    if not isinstance(judge, ScoringJudge):
        assert not isinstance(job.judge, NoJudge)
        ids = sorted(ids[place] for place in row_sample.draw_sample(ids, job.judge.num_questions))
    groups = run_answers.group_equal(policies, answers, ids)
    judged_ones = [group[0] for group in groups]
    own_tokens = tokenizer is not None and all(
        has_tokens_of(tokenizer, job, answers[one.run], one.policy, ids) for one in judged_ones
    )
    questions = run_answers.build_questions(judged_ones, answers, ids, own_tokens=own_tokens)
    names = [one.name for one in judged_ones]
    job_judges.refuse_unaffordable(judge, battles.in_both_orders(battles.policy_battles(questions, names)))
    judged = battles.judge_all(judge, questions, names, run)
    pq.write_table(battles.verdict_table({judge.name: judged}), run.artifact / "verdicts.parquet")
    run.warnings += judge.warnings()
    metrics = battles.rate_metrics(judge.name, judged, None) if len(names) > 1 else {}
    board = leaderboard.build_board(judged, groups)
    fought = leaderboard.build_battles(judged, groups, board, metrics, judge.name)
    found = {
        "judge": {"about": judge.about, **job.judged_by.model_dump()},
        "questions": len(ids),
        "board": board,
        "battles": fought,
        "sentences": leaderboard.describe_board(job.judged_by, job.runs, board, fought),
    }
    return found, metrics


def load_judge(job: CompareJob, run: Run) -> tuple[Judge, PreTrainedTokenizerBase | None]:
    """Return the judge, and the tokenizer of its model if that reads answers as tokens. Raises InputError."""
    assert job.judged_by
    if job.judged_by.name == "gold":
        return gold_judge(), None
    device = devices.set_up(run.machine.device, run.machine.threads)
    if job.judged_by.name == "lm":
        assert not isinstance(job.judge, NoJudge)
        return language_judges.load_language_judge(job.judge, run, device), None
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    chats = table_rows.read_chats(
        run.inputs["answers1"] / "answers.parquet"
    )  # all runs have the questions that are compared
    encoder = pair_tables.build_encoder(job.text, tokenizer, chats)
    judges = job_judges.load_reward_judges(job, run, encoder, device)
    return next(one for one in judges if one.name == job.judged_by.name), tokenizer


def has_tokens_of(
    tokenizer: PreTrainedTokenizerBase, job: CompareJob, answers: RunAnswers, policy: str, ids: Sequence[int]
) -> bool:
    """Return whether a policy's answers are tokens of this tokenizer: whether they decode to its texts.

    Runs of other models have other tokens. If one policy's do not fit, all answers are judged as texts.
    """
    for id in ids:
        answer = answers.answers[policy][id]
        if prompts.decode_answer(tokenizer, answer.ids or [], template=job.text.template) != answer.text:
            return False
    return True


def build_samples(
    answers: Sequence[RunAnswers], ids: Sequence[int], policies: Sequence[Contestant]
) -> list[dict[str, Any]]:
    """Return shared questions, evenly spaced, with the answers of all policies side by side."""
    num_samples = comparison_page.NUM_SAMPLES
    groups = run_answers.group_equal(policies, answers, ids)
    places = sorted({len(ids) * k // num_samples for k in range(num_samples)}) if ids else []
    return [
        {
            "question": answers[0].questions[ids[place]],
            "answers": [
                {
                    "title": leaderboard.name_group(group),
                    "policy": group[0].policy,
                    "text": answers[group[0].run].answers[group[0].policy][ids[place]].text,
                }
                for group in groups
            ],
        }
        for place in places
    ]


if __name__ == "__main__":
    main(compare, CompareJob)
