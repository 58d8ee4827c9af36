"""Choose one of the rows that have the same keys, because the files of a source overlap."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.dataset.columns import Indices


def drop_repeated(
    rows: pa.RecordBatch, keys: Sequence[Indices], value: Callable[[pa.RecordBatch], Any]
) -> pa.RecordBatch:
    """Return the rows [n] in the order of ``keys``, each [n], the most important key last.

    Of rows with equal keys the one with the smallest ``value`` (of a batch of one row) is kept, so that the
    order of the rows does not matter.
    """
    order = np.lexsort(keys)
    is_same = np.all([np.diff(key[order]) == 0 for key in keys], axis=0)  # as the row before
    starts = np.flatnonzero(np.append(True, ~is_same)[: len(order)])
    ends = np.append(starts[1:], len(order))
    kept = order[starts]
    for group in np.flatnonzero(ends - starts > 1).tolist():
        same = order[starts[group] : ends[group]].tolist()
        kept[group] = min(same, key=lambda row: value(rows.slice(row, 1)))
    return rows.take(pa.array(kept))
