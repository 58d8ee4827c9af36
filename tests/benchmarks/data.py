"""Measure the data stage: beside the StackLLaMA article's code, with several processes, on inputs of
growing size.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.sources.stack_exchange import score_answer
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.demo_site import site
from tests.benchmarks.peer_environments import create_environment
from tests.support.dumps import iter_posts
from tests.support.paths import ROOT

PEER, PEER_NEEDS = ROOT / ".bench" / "data-peer", ("datasets==5.2.0", "markdownify==1.2.3")
REAL = ROOT.parent / "shared" / "data" / "stackexchange" / "travel" / "Posts.csv.gz"
COPIES, ROUNDS = 8, 3
PLAIN = {"alike": 1, "personal": "keep"}  # what the article's way does: no rule of ours


class Used(NamedTuple):
    seconds: float  # of the whole process
    texts: int
    pairs: int
    peak_mb: int  # of all its processes together
    largest_mb: int  # of the largest of them


def stage(source: Path, kind: str, *, threads: int, settings: dict[str, Any]) -> Used:
    """Run the data program as a process of its own; return its time and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"seed": 0, "source": {"kind": kind, "path": str(source)}, "data": settings}
        record = {
            "stage": "data",
            "job": job,
            "inputs": {"source": str(source)},
            "machine": {"threads": threads},
        }
        Path(folder, "job.json").write_text(json.dumps(record))
        started, peak, largest = time.perf_counter(), 0, 0
        process = psutil.Popen([sys.executable, "-m", "tasks.programs.data", folder], cwd=ROOT)
        while process.poll() is None:
            sizes = _sizes(process)
            peak, largest = max(peak, sum(sizes)), max(largest, *sizes, 0)
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        assert process.returncode == 0
        kept = json.loads(Path(folder, "artifact", "card.json").read_text())["kept"]
        return Used(seconds, kept["questions"] + kept["answers"], kept["pairs"], peak >> 20, largest >> 20)


def _sizes(process: psutil.Popen) -> list[int]:
    found = []
    for one in [process, *_children(process)]:
        try:
            found.append(one.memory_info().rss)
        except psutil.Error:
            continue
    return found


def _children(process: psutil.Popen) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def beside_the_article() -> list[dict[str, Any]]:
    """Compare our whole process, start included, with the article's code without its imports: same rows,
    one core. What a further text costs is the difference between eight copies of the texts and one.
    """
    python = create_environment(PEER, PEER_NEEDS)
    with tempfile.TemporaryDirectory() as folder:
        rows, few = Path(folder, "rows.parquet"), Path(folder, "few.parquet")
        texts, first = _preferences(rows, COPIES), _preferences(few, 1)
        ours, theirs, ratios, spread, further = [], [], [], [], []
        for _ in range(ROUNDS):
            used = stage(rows, "stack-exchange-preferences", threads=1, settings=PLAIN)
            spread.append(texts / stage(rows, "stack-exchange-preferences", threads=0, settings={}).seconds)
            peer = _peers_way(python, rows, Path(folder))
            ours.append(texts / used.seconds)
            theirs.append(texts / peer["seconds"])
            ratios.append(ours[-1] / theirs[-1])
            start = stage(few, "stack-exchange-preferences", threads=1, settings=PLAIN).seconds
            peers_start = _peers_way(python, few, Path(folder))["seconds"]
            more = texts - first
            further.append((more / (used.seconds - start), more / (peer["seconds"] - peers_start)))
            assert used.pairs <= peer["pairs"] <= 1.02 * used.pairs  # it also pairs answers of equal texts
    name = "datasets.map with markdownify"
    every = [all_ / peer for all_, peer in zip(spread, theirs, strict=True)]
    our_rates, their_rates = zip(*further, strict=True)
    costs = [our / their for our, their in further]
    return [
        _entry("data: preferences rows to pairs, one core", ours, theirs, name, ratios),
        _entry("data: the same, what a further text costs", our_rates, their_rates, name, costs),
        _entry("data: the same on all cores, with our rules", spread, theirs, name, every),
    ]


def over_the_cores() -> list[dict[str, Any]]:
    """Measure a packed dump of the built-in site with one process and with one per core; memory at two
    sizes.
    """
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        archives = {count: _archive(Path(folder), count) for count in (6_000, 18_000)}
        cores = len(os.sched_getaffinity(0))
        for settings, what in ((PLAIN, "no rules"), ({}, "every rule that is on by default")):
            rates = {}
            for threads in (1, cores):
                posts, archive = archives[18_000]
                used = [
                    stage(archive, "stack-exchange", threads=threads, settings=settings)
                    for _ in range(ROUNDS)
                ]
                rates[threads] = [posts / one.seconds for one in used]
            ratios = [all_ / one for all_, one in zip(rates[cores], rates[1], strict=True)]
            entries.append(
                _entry(
                    f"data: .7z to tables, {cores} cores, {what}", rates[cores], rates[1], "one core", ratios
                )
            )
        small, large = (
            stage(archives[count][1], "stack-exchange", threads=cores, settings={}) for count in archives
        )
        note = f"{small.peak_mb:,} MB at a third of the posts; largest process {large.largest_mb:,} MB"
        print(
            f"{'data: peak memory of all processes':<52} {large.peak_mb:>10,} MB         {note}", flush=True
        )
    return entries


def _entry(
    what: str, ours: Sequence[float], peer: Sequence[float], name: str, ratios: Sequence[float]
) -> dict[str, Any]:
    middle, other, ratio = (statistics.median(values) for values in (ours, peer, ratios))
    print(f"{what:<52} {middle:>10,.0f} texts/s   {ratio:.1f} x {name} ({other:,.0f})", flush=True)
    entry = {"what": what, "unit": "texts/s", "dtype": "", "ours": middle, "peer": other, "peer_name": name}
    return entry | {"ratio": ratio, "runs": ratios}


def _archive(folder: Path, num_questions: int) -> tuple[int, Path]:
    import py7zr

    posts, archive = folder / "Posts.xml", folder / f"{num_questions}.7z"
    count = site.write_posts(site.generate(num_questions=num_questions, seed=0), posts)
    with py7zr.SevenZipFile(archive, "w", filters=[{"id": py7zr.FILTER_LZMA2, "preset": 1}]) as file:
        file.write(posts, "Posts.xml")
    posts.unlink()
    return count, archive


def _preferences(path: Path, copies: int) -> int:
    """Write real posts, if they are there, as rows of HuggingFaceH4/stack-exchange-preferences; return
    their number.
    """
    source = iter_posts(REAL) if REAL.exists() else _generated()
    questions, answers = {}, defaultdict(list)
    for post in source:
        if post.parent:
            answers[post.parent].append(post)
        else:
            questions[post.id] = post
    rows = []
    for copy in range(copies):
        for number, question in questions.items():
            if written := answers[number]:
                replies = [_reply(post, question.accepted) for post in written]
                about = {"qid": number + copy * 10**8, "date": question.created[:10].replace("-", "/")}
                page = f"https://site{copy}.example/q/{number}"
                rows.append(
                    about
                    | {
                        "question": question.body,
                        "answers": replies,
                        "metadata": [page, f"https://site{copy}.example", ""],
                    }
                )
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=1000)
    return len(rows) + sum(len(row["answers"]) for row in rows)


def _reply(post: Post, accepted: int) -> dict[str, Any]:
    about = {"answer_id": post.id, "author": "", "author_profile": "", "selected": post.id == accepted}
    return about | {"pm_score": score_answer(post.votes, post.id == accepted), "text": post.body}


def _generated() -> Any:
    return (post for post in site.generate(num_questions=2_000, seed=0))


def _peers_way(python: Path, rows: Path, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"HF_HOME": str(folder / f"cache{time.monotonic_ns()}"), "HF_HUB_OFFLINE": "1"}
    command = [python, ROOT / "tests" / "benchmarks" / "peer_data.py", rows, folder / "pairs.parquet"]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
