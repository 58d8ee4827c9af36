"""Test that ranks wait for a table of tokens for longer than a collective may take."""

import time
from pathlib import Path

import pytest

from tasks.programs.runtime.program import Run
from tasks.programs.token_tables import cache
from tasks.rlhf.batches.truncation import Encoder
from tasks.system.locks import acquire
from tests.programs.ranks.test_distributed import start
from tests.programs.test_token_tables import encoder, read_documents
from tests.support import tiny
from tests.support.fake_programs import wait_until

WAITING = "waiting for another run that tokenises this table"
SCRIPT = """
import sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from tasks.rlhf.compute import distributed
from tests.programs.ranks import test_unequal_ranks as own

with distributed.process_group():
    distributed.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=5))
    own.read_with_a_slow_rank(Path(sys.argv[1]))
"""


def read_with_a_slow_rank(folder: Path) -> None:
    """Read a table whose second half takes the second rank 10 seconds to tokenise."""
    from tasks.rlhf.compute import distributed

    distributed.EXCHANGE_SECONDS, cache.BATCH_ROWS, honest = 0.5, 2, Encoder.encode_prompt

    def encode_slowly(self: Encoder, question: str) -> list[int]:
        time.sleep(0.7 * distributed.rank())
        return honest(self, question)

    Encoder.encode_prompt = encode_slowly  # type: ignore[method-assign]
    start = time.monotonic()
    found = read_documents(Run(folder), encoder())
    print(f"read {len(found)} documents in {time.monotonic() - start:.1f} s", flush=True)
    assert time.monotonic() - start > 15


@pytest.mark.slow
def test_ranks_wait_longer_than_a_collective_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is 5 seconds; another run holds the lock for 8, and one part takes 10 more than the other."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    data = tiny.data_folder(tmp_path / "data", 30)
    run = Run(tiny.write_job(tmp_path / "run", "sft", {}, {"data": data}))
    table = read_documents(run, encoder())
    (record,) = (tmp_path / "home" / "tokens").glob(f"*/{cache.RECORD}")
    record.unlink()
    (tmp_path / "ranks.py").write_text(SCRIPT)
    metrics, log = run.directory / "metrics.jsonl", run.directory / "log.txt"
    metrics.write_text("")
    with acquire(tmp_path / "home" / "locks" / f"{record.parent.name}.lock"):
        ranks = start(run.directory, str(tmp_path / "ranks.py"), str(run.directory))
        wait_until(lambda: ranks.poll() is not None or WAITING in metrics.read_text())
        time.sleep(8)
    status, output = ranks.wait(), log.read_text()
    assert status == 0, output[-3000:]
    assert output.count(f"read {len(table)} documents in") == 2
    assert WAITING in metrics.read_text()
