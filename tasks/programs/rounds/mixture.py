"""Mix the votes' pairs with the comparisons of all rounds so far, for the reward model.

python -m tasks.programs.rounds.mixture DIR

inputs: comparisons1, comparisons2, ... (of each round so far); data, if votes are mixed in
artifact: reward.parquet (the columns of the data stage's, and pair_id and origin), summary.json

Deviation from Ouyang et al. 2022: the share of old pairs is set, instead of training on all data so far.
"""

import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.config.jobs import MixtureJob
from tasks.programs.rounds.hashed_number import hashed_number
from tasks.programs.rounds.round_tables import MIXTURE, write_table
from tasks.programs.runtime.program import Run, main

VOTES = "votes"


def write_mixture(job: MixtureJob, run: Run) -> None:
    """Write the table that the reward model is trained on."""
    # 1. The comparisons of each round, and the votes. A killed program starts over.
    run.rewind(0)
    numbers = sorted(
        int(found[1]) for name in run.inputs if (found := re.fullmatch(r"comparisons(\d+)", name))
    )
    assert numbers, "a mixture has a round"
    rounds = [pq.read_table(run.inputs[f"comparisons{number}"] / "comparisons.parquet") for number in numbers]
    if job.old_share:
        votes = pq.read_table(run.inputs["data"] / "reward.parquet")
    else:
        votes = pa.schema(MIXTURE.items()).empty_table()

    # 2. The mixture.
    table = mix(votes, rounds, old_share=job.old_share, seed=job.seed)
    counts = Counter(table["origin"].to_pylist())
    num_new = table.num_rows - counts[VOTES]
    wanted = num_votes(num_new, job.old_share)
    if counts[VOTES] < wanted:
        run.warn(
            f"The reward split has {counts[VOTES]:,} pairs of the {wanted:,} that rounds.old_share="
            f"{job.old_share:g} asks for beside {num_new:,} comparisons: all of them are used."
        )

    # 3. The artifact.
    write_table(run.artifact / "reward.parquet", table)
    run.finish(
        {
            "mixture.pairs": table.num_rows,
            "mixture.votes": counts[VOTES],
            "mixture.comparisons": num_new,
            "mixture.old_share": counts[VOTES] / table.num_rows,
        },
        pairs=dict(sorted(counts.items())),
    )


def num_votes(num_new: int, old_share: float) -> int:
    """Return how many votes' pairs have the share ``old_share`` beside ``num_new`` comparisons."""
    return round(old_share / (1 - old_share) * num_new)


def mix(votes: pa.Table, rounds: Sequence[pa.Table], *, old_share: float, seed: int) -> pa.Table:
    """Return the comparisons of all rounds and the drawn part of the votes, in the order of question ids.

    Votes are drawn by question, by hashes of the seed and the question's id, so that the votes of a smaller
    share are a part of those of a larger one. Of the last question not all pairs may be in.
    """
    num_new = sum(one.num_rows for one in rounds)
    ids = votes["question_id"].to_pylist()
    order = sorted(range(len(ids)), key=lambda row: (hashed_number("vote", seed, ids[row]), ids[row], row))
    drawn = votes.take(pa.array(sorted(order[: num_votes(num_new, old_share)]), pa.int64()))
    tables = [_of_origin(drawn, VOTES)]
    tables += [_of_origin(one, f"round {number}") for number, one in enumerate(rounds, 1)]
    table = pa.concat_tables(tables)
    # readers group rows of one question that stand together
    ids = table["question_id"].to_pylist()
    return table.take(pa.array(sorted(range(len(ids)), key=ids.__getitem__), pa.int64()))


def _of_origin(table: pa.Table, origin: str) -> pa.Table:
    """Return a table in the columns of the mixture, with null in those that it lacks."""
    columns = []
    for name, kind in MIXTURE.items():
        if name == "origin":
            columns.append(pa.array([origin] * table.num_rows, kind))
        elif name in table.column_names:
            columns.append(table[name].cast(kind))
        else:
            columns.append(pa.nulls(table.num_rows, kind))
    return pa.Table.from_arrays(columns, schema=pa.schema(MIXTURE.items()))


if __name__ == "__main__":
    main(write_mixture, MixtureJob)
