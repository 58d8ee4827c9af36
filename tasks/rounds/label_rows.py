"""Read labels from files of rows, and write them, as other programs exchange them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.rounds.label_log import VERDICTS, Label, new_label
from tasks.system.errors import InputError
from tasks.system.files import replace_text, replacing

Row = Mapping[str, Any]
OTHER_SIDE = {"first": "second", "second": "first"}
PARQUET = ".parquet"
MAX_NAME = 60  # characters of a rater's name


def check_rater(name: Any) -> str:
    """Return the name of a rater without spaces around it. Raises InputError."""
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise InputError(f"A rater's name is 1 to {MAX_NAME} printable characters, not {name!r}")
    return name.strip()


def read_file(path: Path, asked: Sequence[Row]) -> list[Label]:
    """Return the labels of a file, JSON lines or parquet, all of which must be of the pairs in ``asked``.

    A row has ``verdict``, ``rater`` and ``pair_id``; or in place of the last ``prompt``, ``first`` and
    ``second``, the answers either way round. A row with a ``label_id`` keeps it, and is added once however
    often it is imported. Withdrawn rows are left out. Raises InputError.
    """
    rows = _read_parquet(path) if path.suffix == PARQUET else _read_lines(path)
    by_id = {pair["pair_id"]: pair for pair in asked}
    by_text = {(pair["prompt"], frozenset((pair["first"], pair["second"]))): pair for pair in asked}
    labels, num_unknown = [], 0
    for number, row in enumerate(rows, start=1):
        if row.get("withdrawn"):
            continue
        texts = (row.get("prompt"), frozenset((row.get("first"), row.get("second"))))
        pair = by_id.get(row["pair_id"]) if row.get("pair_id") else by_text.get(texts)
        if pair is None:
            num_unknown += 1
        else:
            labels.append(_parse(row, pair, f"Row {number:,} of {path}"))
    if num_unknown:
        raise InputError(
            f"{num_unknown:,} of {len(rows):,} rows of {path} are of no pair of this round: nothing is "
            "imported"
        )
    return labels


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from None
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return [_parse_line(line, number, path) for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_line(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"Line {number:,} of {path} is no JSON object: {line[:60]!r}")
    return row


def _parse(row: Row, pair: Row, place: str) -> Label:
    verdict = row.get("verdict")
    if verdict not in VERDICTS:
        raise InputError(f"{place} has the verdict {verdict!r}: it must be one of {', '.join(VERDICTS)}")
    if not row.get("pair_id") and row["first"] != pair["first"]:  # the other way round than it is asked
        verdict = OTHER_SIDE.get(str(verdict), str(verdict))
    try:
        rater = check_rater(row.get("rater"))
        seconds = None if row.get("seconds") is None else float(row["seconds"])
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from None
    made = new_label(pair["pair_id"], str(verdict), rater, seconds=seconds)
    return made._replace(
        label_id=str(row.get("label_id") or made.label_id),
        time=str(row.get("time") or made.time),
        shown_first=str(row.get("shown_first") or made.shown_first),
    )


def write_file(path: Path, labels: Iterable[Label], asked: Sequence[Row]) -> int:
    """Write labels with the texts of their pairs as JSON lines or parquet; return their number."""
    pairs = {pair["pair_id"]: pair for pair in asked}
    rows = [_with_texts(label, pairs[label.pair_id]) for label in labels if label.pair_id in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != PARQUET:
        replace_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        return len(rows)
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return len(rows)


def _with_texts(label: Label, pair: Row) -> dict[str, Any]:
    return label._asdict() | {name: pair[name] for name in ("prompt", "first", "second")}
