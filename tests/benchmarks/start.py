"""Measure how long SFT, reward model and DPO read their rows before they load the model, and in what memory.

python -m tests.benchmarks.start [--rows 200000] [--ranks 1 2] [--stages sft reward dpo] [--before FOLDER]

FOLDER is a checkout of other code to measure too. Each program is killed when it has read its rows: it then
says how much memory a step takes. Memory is the largest sum over the ranks of what each has alone and its
share of what they have together (Pss), so files that several map count once.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.config.sections.models import Text
from tasks.programs.reference import COLUMNS
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.questions import read_pairs
from tasks.rlhf.models import loading
from tasks.rlhf.models.builtin import train_tokenizer
from tests.support import tiny
from tests.support.paths import ROOT

VOCABULARY, READ = 8192, "A step takes about"
PROMPT_WORDS, ANSWER_WORDS = 40, 80
TEXT = {"max_prompt_tokens": 256, "max_answer_tokens": 256}
JOBS: dict[str, dict[str, Any]] = {
    "sft": {"block_tokens": 512}, "reward": {"probe": False}, "dpo": {},
}  # fmt: skip


class Start(NamedTuple):
    """What reading the rows of a stage took."""

    seconds: float
    peak_mb: int


def write_inputs(root: Path, num_rows: int) -> dict[str, Path]:
    """Write a tiny model with a tokenizer of some size, and tables of ``num_rows`` rows."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(5000)]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(most // 2, most)))

    tokenizer = train_tokenizer([text(200) for _ in range(500)], vocabulary=VOCABULARY)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "data").mkdir()
    rows: list[dict[str, Any]] = [
        {"question_id": row, "prompt": text(PROMPT_WORDS), "answer": text(ANSWER_WORDS)}
        for row in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "finetune.parquet")
    pairs = []
    for first in range(0, num_rows, 2):
        shared = rows[first]["answer"]
        for row in rows[first : first + 2]:
            pair = {"question_id": first, "prompt": rows[first]["prompt"], "chosen": shared}
            pairs.append(pair | {"rejected": row["answer"] + ".", "gap": 1.0, "chosen_older": None})
    pq.write_table(pa.Table.from_pylist(pairs), root / "data" / "reward.parquet")
    return {"data": root / "data", "base": root / "model", "model": root / "model"}


def write_reference(root: Path, inputs: dict[str, Path]) -> Path:
    """Write log-probabilities of all answers, as the stage reference does."""
    run = Run(tiny.write_job(root / "reading", "reference", {}, inputs))
    encoder = pair_tables.build_encoder(
        Text.model_validate(TEXT), loading.load_tokenizer(inputs["model"]), {}
    )
    rows = []
    for question in read_pairs(run, inputs["data"] / "reward.parquet", encoder):
        rows += [(question.question_id, i, len(ids), -1.0) for i, ids in enumerate(question.answers)]
    columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(COLUMNS.values())]
    (root / "reference").mkdir()
    pq.write_table(
        pa.Table.from_arrays(columns, names=list(COLUMNS)), root / "reference" / "reference.parquet"
    )
    return root / "reference"


def measure(code: Path, folder: Path, stage: str, inputs: dict[str, Path], home: Path, ranks: int) -> Start:
    """Start a program in the checkout ``code``, and kill it when it has read its rows."""
    common = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 1, "batch_size": 4}
    job = {"seed": 0, "text": TEXT, stage: common | JOBS[stage]}
    tiny.write_job(folder, stage, job, inputs)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [sys.executable, "-m", *(torchrun if ranks > 1 else []), f"tasks.programs.{stage}", str(folder)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(code), "ALIGNFLOW_HOME": str(home)}
    log, peak, started = folder / "log.txt", 0, time.perf_counter()
    with log.open("ab") as file:
        process = psutil.Popen(
            command, cwd=code, env=os.environ | variables | {"TOKENIZERS_PARALLELISM": "false"},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    while READ not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        peak = max(peak, sum(shares(process)))
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return Start(seconds, peak >> 20)


def shares(process: psutil.Popen) -> Iterator[int]:
    """Yield the bytes of a process and of those that it started."""
    for one in [process, *process.children(recursive=True)]:
        try:
            yield one.memory_full_info().pss
        except psutil.Error:
            continue


def main() -> None:
    """Print a line for each start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", nargs="+", choices=sorted(JOBS), default=list(JOBS))
    parser.add_argument("--before", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        os.environ["ALIGNFLOW_HOME"] = str(root / "home")
        inputs = write_inputs(root, args.rows)
        if "dpo" in args.stages:
            inputs["reference"] = write_reference(root, inputs)
        number = 0
        for stage in args.stages:
            for ranks in args.ranks:
                home = root / f"home-{stage}-{ranks}"
                starts = [("first", ROOT), ("again", ROOT)]
                for title, code in [*([("before", args.before)] if args.before else []), *starts]:
                    number += 1
                    found = measure(code, root / f"run-{number}", stage, inputs, home, ranks)
                    record = {"stage": stage, "ranks": ranks, "start": title, **found._asdict()}
                    print(json.dumps(record | {"seconds": round(found.seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
