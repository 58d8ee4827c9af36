"""Measure what a linear probe predicts of a site's votes, by cross-validation over all questions.

python -m tests.benchmarks.probe JOB    JOB: the folder of a reward stage's job with its inputs; only read
"""

import json
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import RewardJob
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.evaluation import linear_probe, pair_accuracy, probe_start, reward_evaluation
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.models import loading, lora
from tasks.rlhf.models.reward_model import Member
from tasks.rlhf.models.trainable import unchanged

FOLDS, SEED = 5, 11


def folded(features: Tensor, questions: list[Comparison], job: RewardJob) -> dict[str, Interval]:
    """Return accuracies of the probe and of the rules, and their differences, from the features (S, D) of
    all answers.
    """
    fold = [seeds.mix(SEED, c.question_id) % FOLDS for c in questions]
    of_question = features.split([len(c.answers) for c in questions])
    pairs = reward_evaluation.pairs_of(questions)
    rewards, ahead, together = (
        [torch.zeros(0)] * len(questions),
        torch.zeros(len(questions)).double(),
        torch.zeros(len(questions), 2).double(),
    )
    for part in range(FOLDS):
        seen = [i for i, number in enumerate(fold) if number != part]
        some = [questions[i] for i in seen]
        start, known = comparisons.age_bias(some), reward_evaluation.pairs_of(some)
        found = linear_probe.fit_probe(
            torch.cat([of_question[i] for i in seen]),
            probe_start.weighted_pairs(
                known, torch.ones(len(some)), probe_start.PairLoss(job.reward.margin, job.reward.weigh, start)
            ),
            seed=job.seed,
        )
        for i in (i for i, number in enumerate(fold) if number == part):
            rewards[i] = of_question[i] @ found.head[0]
            ahead[i], together[i] = start, reward_evaluation.fit_baseline_rules(known)
    margin = reward_evaluation.margins(pairs, torch.cat(rewards)) + ahead[pairs.question] * (
        2 * pairs.older - 1
    )
    both = (reward_evaluation.lengths_and_ages(pairs) * together[pairs.question]).sum(dim=1)
    nothing = torch.zeros(len(margin))
    rules = {
        "longer wins": pair_accuracy.credit(pairs.tokens[pairs.chosen], pairs.tokens[pairs.rejected]),
        "older wins": pairs.older,
        "both rules": pair_accuracy.credit(both, nothing),
    }
    ours = pair_accuracy.credit(margin, nothing)
    told = {
        name: pair_accuracy.wider_interval(pair_accuracy.measure(credit, pairs.question))
        for name, credit in {"probe": ours, **rules}.items()
    }
    return told | {
        f"probe over {name}": pair_accuracy.accuracy_difference(ours, rule, pairs.question)
        for name, rule in rules.items()
    }


def main(folder: Path) -> None:
    """Print the table."""
    record = json.loads((folder / "job.json").read_text())
    job, inputs = (
        RewardJob.model_validate(record["job"]),
        {name: Path(path) for name, path in record["inputs"].items()},
    )
    device, text = devices.set_up("auto", 0), job.text
    tokenizer = loading.load_tokenizer(inputs["model"])
    rows = pq.read_table(
        inputs["data"] / "reward_groups.parquet", columns=comparisons.RANKING_COLUMNS
    ).to_pylist()
    texts = comparisons.from_rankings(rows, most_answers=job.reward.max_answers)
    encoder = Encoder(
        tokenizer,
        template=text.template,
        max_prompt_tokens=text.max_prompt_tokens,
        max_answer_tokens=text.max_answer_tokens,
    )
    questions = comparisons.encode_with(encoder, texts)
    model = loading.load(inputs["model"], device=device, precision=job.weights.merged).eval()
    width = model.config.hidden_size
    collate = partial(comparisons.collate, pad_id=tokenizer.pad_token_id, device=device, hidden_size=width)
    member = Member(partial(unchanged, model), lora.new_head(width))
    features = probe_start.answer_features(member, questions, "all", collate=collate, batch_size=12)
    for name, share in folded(features, questions, job).items():
        print(
            f"{name:24} {100 * share.value:6.1f} %  ({100 * share.low:.1f} to {100 * share.high:.1f})  "
            f"{share.n} pairs"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
