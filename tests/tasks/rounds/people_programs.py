"""Let the fake programs of rounds ask about pairs that people can label, and use the labels."""

from pathlib import Path

from tests.support import fake_programs
from tests.tasks.rounds.made_rounds import make_pairs

# put before a fake program: adds to what it writes
ADDING = """
import pyarrow as pa
import pyarrow.parquet as pq
finish = Run.finish


def finish_with_more(run, metrics):
    add(run)
    finish(run, metrics)


Run.finish = finish_with_more
"""
ASKED = """
def add(run):
    pq.write_table(pa.Table.from_pylist(ROWS), run.artifact / "asked.parquet")
"""
COMPARISONS = """
def add(run):
    rows = [json.loads(line) for line in run.inputs["labels"].read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), run.artifact / "labels.parquet")
    right = dict(value=0.5, low=0.2, high=0.8, n=4)
    rater = dict(name="Ann", verdicts=dict(tie=3), right=right, left=right, seconds=1.5, flagged=False)
    (run.artifact / "agreement.json").write_text(json.dumps(dict(raters=[rater], kappa=right)))
"""


def make_tree(folder: Path, count: int) -> Path:
    """Return a tree of fake programs of which ``asked`` asks about ``count`` pairs."""
    tree = fake_programs.make_tree(folder)
    rows = f"ROWS = {make_pairs(count, gold=1)!r}\n"
    for stage, more in {"asked": rows + ASKED, "comparisons": COMPARISONS}.items():
        fake_programs.write_program(tree, stage, more=ADDING + more)
    return tree
