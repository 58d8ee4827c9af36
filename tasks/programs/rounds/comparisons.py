"""Label the pairs of a round, and make comparisons of the labels.

python -m tasks.programs.rounds.comparisons DIR

inputs: asked; labels (a file of rows), if people or a file give them; prompt and judge, if a language model
        does; model and reward, if the member of the reward model does that PPO never sees
artifact: labels.parquet (one row a label), comparisons.parquet (one row a pair with a better answer, in the
          columns of the data stage's pairs), agreement.json (raters, alpha and kappa), summary.json (its
          labeller: who labelled)
"""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq

from tasks.config.jobs import ComparisonsJob
from tasks.config.rounds import FileLabels, GoldLabels, JudgeLabels, PeopleLabels
from tasks.config.sections.judges import NoJudge
from tasks.judges.judge import Judge
from tasks.judges.reward_judge import RewardScores, held_out_judge
from tasks.programs.rounds import labellers, raters
from tasks.programs.rounds.decided_pairs import Decided, decide
from tasks.programs.rounds.label_rows import LabelRow, read_label_file
from tasks.programs.rounds.round_tables import COMPARISON, LABEL, write_rows
from tasks.programs.runtime import pair_tables, table_rows
from tasks.programs.runtime.language_judges import load_language_judge
from tasks.programs.runtime.policies import load_tuned
from tasks.programs.runtime.program import Run, main, to_json
from tasks.rlhf.compute import devices
from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.models import loading
from tasks.system.errors import InputError

Row = dict[str, Any]


def compare(job: ComparisonsJob, run: Run) -> None:
    """Label the pairs, decide them, and describe the raters."""
    # 1. Labels. A killed program starts over.
    run.rewind(0)
    asked: list[Row] = pq.read_table(run.inputs["asked"] / "asked.parquet").to_pylist()
    labels, labeller = give_labels(job, asked, run)

    # 2. Which answer of each pair is better.
    least_right = job.labels.least_right if isinstance(job.labels, PeopleLabels) else 0.0
    decided = decide(labels, asked, least_right)
    if not decided.comparisons:
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(decided.counts.items())) or "no label"
        raise InputError(
            f"No pair of this round has a better answer ({counts}): give more labels, or ask other pairs."
        )
    run.warnings += raters.warnings_of(decided.raters)

    # 3. The artifact.
    questions = {pair["pair_id"] for pair in asked if pair["known"]}
    agreement = raters.measure_agreement([one for one in labels if one.pair_id not in questions])
    content = raters.as_json(decided.raters, agreement)
    (run.artifact / "agreement.json").write_text(to_json(content, indent=1))
    write_rows(run.artifact / "labels.parquet", (one._asdict() for one in labels), LABEL)
    write_rows(run.artifact / "comparisons.parquet", decided.comparisons, COMPARISON)
    metrics: dict[str, Any] = count_pairs(decided, len(asked) - len(questions))
    metrics |= {f"comparisons.{name}": value._asdict() for name, value in agreement.items()}
    if questions:
        right = raters.right_on_gold_questions(decided.raters)
        metrics["comparisons.right_on_gold_questions"] = right._asdict()
    if job.on_site:
        metrics["comparisons.right_by_gold"] = right_by_gold(decided.comparisons)
    run.finish(metrics, labeller=labeller)


def give_labels(job: ComparisonsJob, asked: Sequence[Row], run: Run) -> tuple[list[LabelRow], Row]:
    """Return the labels of the pairs in ``asked``, and who has given them. Raises InputError."""
    match job.labels:
        case GoldLabels(noise=noise, tie=tie):
            gold = {"kind": "gold", "noise": noise, "tie": tie}
            return labellers.gold_labels(asked, noise=noise, tie=tie, seed=job.seed), gold
        case JudgeLabels():
            judge = load_judge(job, asked, run)
            found = labellers.judge_labels(judge, asked, run)
            run.warnings += judge.warnings()
            return found, {"kind": "judge", "judge": judge.title}
        case FileLabels() | PeopleLabels():
            return read_labels(job, asked, run), {"kind": job.labels.kind}


def load_judge(job: ComparisonsJob, asked: Sequence[Row], run: Run) -> Judge:
    """Return the judge that the settings name. Raises InputError."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    if not isinstance(job.judge, NoJudge):
        return load_language_judge(job.judge, run, device)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, table_rows.chats_of(asked))
    models = load_tuned(run, job.weights.merged, device, with_held_out=True)
    assert models.held_out is not None, "check_rounds asks for reward.held_out_member"
    return held_out_judge(
        RewardScores(models.held_out, encoder, tokenizer.pad_token_id, device, job.batch_size)
    )


def read_labels(job: ComparisonsJob, asked: Sequence[Row], run: Run) -> list[LabelRow]:
    """Return the labels of the round's pairs from the input file. Raises InputError if there are none."""
    found, others = read_label_file(run.inputs["labels"], asked, source=job.labels.kind)
    if not found:
        where = run.inputs["asked"] / "asked.parquet"
        raise InputError(
            f"The file of labels has none of the {len(asked):,} pairs that this round asks about (labels of "
            f"other pairs: {others:,}). The pairs are the rows of {where}: label them and start again."
        )
    return found


def count_pairs(decided: Decided, num_asked: int) -> dict[str, int]:
    """Return the numbers of pairs by what became of them, and of raters."""
    counts = decided.counts
    return {
        "comparisons.asked": num_asked,
        "comparisons.labelled": sum(counts.values()) - counts.get("skip", 0),
        "comparisons.pairs": len(decided.comparisons),
        "comparisons.ties": counts.get("tie", 0),
        "comparisons.both_bad": counts.get("both_bad", 0),
        "comparisons.split": counts.get("split", 0),
        "comparisons.skipped": counts.get("skip", 0),
        "comparisons.raters": len(decided.raters),
        "comparisons.flagged": sum(one.flagged for one in decided.raters),
    }


def right_by_gold(comparisons: Sequence[Row]) -> dict[str, Any]:
    """Return the share of comparisons that the gold scorer decides the same way, of those it does not tie.

    It measures the labels; nothing learns from it.
    """
    verdicts = [
        labellers.gold_verdict(row | {"first": row["chosen"], "second": row["rejected"]})
        for row in comparisons
    ]
    return wilson(verdicts.count("first"), len(verdicts) - verdicts.count("tie"))._asdict()


if __name__ == "__main__":
    main(compare, ComparisonsJob)
