"""Hold the inputs, folders and counters that the steps of the data stage share."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tasks.config.jobs import DataJob
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.programs.data_stage.parts import Parts
from tasks.programs.runtime.program import Run

NUM_STEPS = 3  # read, filter, write: each counts as one pass over the source's bytes


class Counts(NamedTuple):
    """Counters of what was read, dropped and masked."""

    read: Counter[str]
    dropped: Counter[str]
    masked: Counter[str]
    tests: Counter[str]  # rows of files that are named as a test set, by file
    warnings: RowWarnings

    @classmethod
    def empty(cls) -> "Counts":
        """Return counters at zero."""
        return cls(
            read=Counter(),
            dropped=Counter(),
            masked=Counter(),
            tests=Counter(),
            warnings=RowWarnings.empty(),
        )


class DataRun(NamedTuple):
    """One run of the data stage."""

    job: DataJob
    run: Run
    source: Path
    work: Path  # folder of intermediate files
    parts: Parts
    counts: Counts
    size: int  # bytes of the source

    def log_progress(self, steps: float, **counts: float) -> None:
        """Log how many of the steps are done, as a part of the source's bytes."""
        self.run.log_bytes(int(self.size * steps / NUM_STEPS), self.size, **counts)
