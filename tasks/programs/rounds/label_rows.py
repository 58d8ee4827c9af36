"""Read labels of pairs from a file of rows, as people, scripts and `alignflow labels export` write it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.programs.rounds.choose_pairs import pair_id
from tasks.system.errors import InputError
from tasks.system.hashing import digest_of

VERDICTS = ("first", "second", "tie", "both_bad", "skip")
OTHER_SIDE = {"first": "second", "second": "first"}


class LabelRow(NamedTuple):
    """A rater's verdict on a pair; the columns are explained in round_tables.LABEL."""

    label_id: str
    pair_id: str
    verdict: str
    rater: str
    source: str
    time: str = ""
    seconds: float | None = None
    shown_first: str = "first"
    withdrawn: bool = False
    why: str = ""


def label_id(pair: str, rater: str, number: int = 0) -> str:
    """Return the id of a rater's label of a pair; a further one of the same rater has another number."""
    return digest_of([pair, rater, number])[:32]


def read_label_file(
    path: Path, asked: Sequence[Mapping[str, Any]], *, source: str
) -> tuple[list[LabelRow], int]:
    """Return the labels of the pairs in ``asked``, and the number of labels of other pairs.

    A row has ``verdict``, ``rater`` and ``pair_id``, or in place of that ``prompt`` and the answers ``first``
    and ``second``. Withdrawn labels are left out. Raises InputError if a row cannot be read.
    """
    rows = _read_rows(path)
    withdrawn = {row.get("label_id") for row in rows if row.get("withdrawn")}
    pairs = {pair["pair_id"]: pair for pair in asked}
    found, num_others = [], 0
    for number, row in enumerate(rows, 1):
        if row.get("withdrawn") or (row.get("label_id") and row["label_id"] in withdrawn):
            continue
        label = _parse(row, pairs, f"Row {number:,} of the file of labels", number=number, source=source)
        if label.pair_id in pairs:
            found.append(label)
        else:
            num_others += 1
    return found, num_others


def _read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        try:
            rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        except pa.ArrowException as error:
            raise InputError(f"The file of labels cannot be read as parquet: {error}") from None
        return rows
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_parse_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: str, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"Line {number:,} of the file of labels is no JSON object: {line[:60]!r}")
    return row


def _parse(
    row: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Any]], place: str, *, number: int, source: str
) -> LabelRow:
    verdict, rater = row.get("verdict"), row.get("rater")
    if verdict not in VERDICTS:
        raise InputError(f"{place} has the verdict {verdict!r}: it must be one of {', '.join(VERDICTS)}.")
    if not isinstance(rater, str) or not rater:
        raise InputError(f"{place} has no rater: name who gave the verdict.")
    seconds, shown_first = row.get("seconds"), row.get("shown_first") or "first"
    if not isinstance(seconds, int | float | None):
        raise InputError(f"{place}: seconds must be a number, got {seconds!r}.")
    if shown_first not in OTHER_SIDE:
        raise InputError(f"{place}: shown_first must be first or second, got {shown_first!r}.")
    name = _find_pair(row, place)
    if name in pairs and not row.get("pair_id") and row["first"] != pairs[name]["first"]:
        verdict, shown_first = OTHER_SIDE.get(verdict, verdict), OTHER_SIDE[shown_first]
    return LabelRow(
        label_id=str(row.get("label_id") or label_id(name, rater, number)),
        pair_id=name,
        verdict=verdict,
        rater=rater,
        source=source,
        time=str(row.get("time") or ""),
        seconds=None if seconds is None else float(seconds),
        shown_first=shown_first,
    )


def _find_pair(row: Mapping[str, Any], place: str) -> str:
    """Return the id of the pair that a row names. Raises InputError."""
    if row.get("pair_id"):
        return str(row["pair_id"])
    texts = [row.get(column) for column in ("prompt", "first", "second")]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place} names no pair: give pair_id, or prompt, first and second as texts.")
    return pair_id(*map(str, texts))
