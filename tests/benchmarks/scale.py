"""Measure the data stage on a large dump: CPU and memory, beside another checkout if one is given.

python -m tests.benchmarks.scale --posts 1000000 [--before CHECKOUT] [--threads 2] [--rules]

The posts are those of a real site, over and over, with numbers and titles of their own.
"""

import argparse
import csv
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import psutil

from tests.benchmarks.data import PLAIN, REAL
from tests.support.paths import ROOT

NUMBERS = ("Id", "ParentId", "AcceptedAnswerId", "OwnerUserId", "Score", "PostTypeId")
APART = 1_000_000  # between the numbers of two copies


def write_dump(path: Path, count: int) -> None:
    """Write ``count`` posts as a Posts.xml."""
    csv.field_size_limit(2**31 - 1)
    with gzip.open(REAL, "rt", encoding="utf-8", newline="") as file:
        rows = [_attributes(row) for row in csv.DictReader(file)]
    with path.open("w", encoding="utf-8") as out:
        out.write('<?xml version="1.0" encoding="utf-8"?>\n<posts>\n')
        for number in range(count):
            copy, place = divmod(number, len(rows))
            out.write(f"  <row {_moved(rows[place], copy)} />\n")
        out.write("</posts>\n")


def _attributes(row: dict[str, str]) -> dict[str, str]:
    """Return what a Posts.xml has of a row of the CSV file, in which numbers may be floats."""
    given = {name: value for name, value in row.items() if value and value not in ("NULL", "NA")}
    return {name: value.removesuffix(".0") if name in NUMBERS else value for name, value in given.items()}


def _moved(row: dict[str, str], copy: int) -> str:
    changed = {name: str(int(row[name]) + copy * APART) for name in NUMBERS[:3] if name in row}
    if "Title" in row:
        changed["Title"] = f"{row['Title']} {copy}"
    return " ".join(f"{name}={quoteattr(value)}" for name, value in (row | changed).items())


def measure(code: Path, source: Path, threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the data program of the checkout ``code``; return its seconds, CPU seconds and memory in MB."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        job = {
            "seed": 0,
            "source": {"kind": "stack-exchange", "path": str(source), "site": "travel.example"},
            "data": settings,
        }
        record = {"stage": "data", "job": job, "inputs": {"source": str(source)}}
        Path(folder, "job.json").write_text(json.dumps(record | {"machine": {"threads": threads}}))
        started, before, peak, largest = time.perf_counter(), _children_seconds(), 0, 0
        variables = os.environ | {"PYTHONPATH": str(code)}
        command = [sys.executable, "-m", "tasks.programs.data", folder]
        process = psutil.Popen(command, cwd=code, env=variables, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            sizes = [size for one in [process, *_descendants(process)] if (size := _resident(one))]
            peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
            time.sleep(0.05)
        assert process.returncode == 0
        return {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(_children_seconds() - before, 1),
            "peak_mb": peak >> 20,
            "largest_process_mb": largest >> 20,
            "pairs": json.loads(Path(folder, "artifact", "card.json").read_text())["kept"]["pairs"],
        }


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _descendants(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--posts", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rules", action="store_true", help="with the rules that are on by default")
    parser.add_argument("--before", type=Path, help="a checkout to be measured first")
    parser.add_argument("--folder", type=Path, help="where there is room for the dump and twice as much")
    args = parser.parse_args()
    settings: dict[str, Any] = {} if args.rules else PLAIN
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for count in args.posts:
            source = Path(folder, "Posts.xml")
            write_dump(source, count)
            for title, code in [*([("before", args.before)] if args.before else []), ("now", ROOT)]:
                found = {"posts": count, "code": title, **measure(code, source, args.threads, settings)}
                print(json.dumps(found), flush=True)
            source.unlink()


if __name__ == "__main__":
    main()
