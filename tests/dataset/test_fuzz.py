"""Test thousands of damaged inputs: each is read with all its rows counted, or refused in one sentence.

The cases of a kind run in a process of their own, so that a crash in a parser's C code or a hang is noticed.
"""

import gzip
import html
import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import py7zr
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataset.sources.test_known_shapes import ASKED
from tests.dataset.sources.test_known_shapes import CASES as SHAPES

pytestmark = pytest.mark.slow

CASES = 260
SECONDS = 300  # for all cases of a kind
QUESTIONS = 50
BOMB = '<?xml version="1.0"?><!DOCTYPE posts [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
# the usual preset takes longer to allocate its dictionary than the program takes for a file
FAST_LZMA = [{"id": py7zr.FILTER_LZMA2, "preset": 0}]
NASTY_HTML = [
    "<div>" * 4000 + "x",
    "<ul><li>" * 3000,
    "<pre><code>" * 3000 + "x",
    "<table><tr><td>" * 1000,
    "<p " + "a=b " * 20_000 + ">x",
    "<" * 20_000,
]
NASTY_HTML += [
    "&#0;&#xD800;&#x110000;",
    "<![CDATA[",
    "<!--",
    "<script>alert(1)</script>",
    "\x01\x02",
    "</p>" * 5000,
]
NASTY_VALUES = [None, 5, -1.5, 10**30, True, "", "x" * 10**5, "\x00", "\ud800", [], [[]], [None], {}, [{}]]
NASTY_VALUES += [{"role": "user"}, [{"role": ["x"], "content": 1}], [{"from": "gpt", "value": None}]]
NASTY_NUMBERS = ["-1", "0", "1e99", "99999999999999999999", "NaN", "", "٣", "1_0", " 5", "0x10", "62.0", "-0"]


def posts(rng: random.Random) -> list[dict[str, str]]:
    """Return questions and answers of which some fields are nasty."""
    rows: list[dict[str, str]] = []
    for number in range(QUESTIONS):
        question = 10 * number + 1
        rows.append(
            {
                "Id": str(question),
                "PostTypeId": "1",
                "Score": "3",
                "Title": f"Question {number}",
                "Body": f"<p>How {number}?</p>",
            }
        )
        rows += [
            {
                "Id": str(question + k),
                "PostTypeId": "2",
                "ParentId": str(question),
                "Score": str(9 - 3 * k),
                "Body": f"<p>Way {k}.</p>",
            }
            for k in (1, 2, 3)
        ]
    for _ in range(rng.randrange(6)):
        row = rng.choice(rows)
        field = rng.choice([*row, "AcceptedAnswerId", "CreationDate"])
        row[field] = rng.choice(NASTY_HTML if field in ("Body", "Title") else NASTY_NUMBERS)
    return rows


def as_xml(rng: random.Random) -> bytes:
    allowed = dict.fromkeys([*range(9), 11, 12, *range(14, 32)], " ") if rng.random() < 0.8 else {}
    rows = [
        " ".join(f'{name}="{html.escape(value).translate(allowed)}"' for name, value in row.items())
        for row in posts(rng)
    ]
    head = rng.choice(['<?xml version="1.0" encoding="utf-8"?>', "\ufeff", ""] * 4 + [BOMB + "]>"])
    text = head + "<posts>" + "\r\n".join(f"<row {row} />" for row in rows) + "</posts>"
    return text.replace("How 3?", rng.choice(["How 3?"] * 16 + ["&j;", "&nosuch;"])).encode(
        rng.choice(["utf-8"] * 14 + ["utf-16", "latin-1"]), "replace"
    )


def as_archive(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    members = [
        ["Posts.xml"],
        ["Badges.xml", "s/Posts.xml"],
        ["Posts.xml", "Tags.xml"],
        ["Badges.xml"],
        ["a/Posts.xml", "b/Posts.xml"],
    ]
    with py7zr.SevenZipFile(buffer, "w", filters=FAST_LZMA) as archive:
        archive.set_encoded_header_mode(rng.random() < 0.5)
        for name in rng.choice(members):
            archive.writef(io.BytesIO(as_xml(rng)), name)
    return buffer.getvalue()


def as_csv(rng: random.Random) -> bytes:
    names = ["Id", "PostTypeId", "ParentId", "Score", "Title", "Body", "AcceptedAnswerId", "CreationDate"]
    rng.shuffle(names)
    if rng.random() < 0.15:
        names.remove(rng.choice(names))
    lines = [",".join(names)]
    for row in posts(rng):
        cells = ['"' + row.get(name, "").replace('"', '""') + '"' for name in names]
        lines.append(",".join(cells[: rng.choice([len(cells)] * 30 + [1])]))
    return "\n".join(lines).encode(rng.choice(["utf-8", "utf-8-sig"] * 8 + ["utf-16"]), "replace")


def comparisons(rng: random.Random) -> list[Any]:
    rows: list[Any] = [
        {"prompt": f"How {n} of them?", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(QUESTIONS)
    ]
    rows += [
        {"prompt": f"Why {n} of them?", "responses": ["a", "b"], "scores": [n, 1.5]} for n in range(QUESTIONS)
    ]
    for _ in range(rng.randrange(6)):
        row = rng.choice([row for row in rows if isinstance(row, dict)])
        row[rng.choice(list(row))] = rng.choice(
            [
                None,
                5,
                [],
                {},
                [{}],
                "",
                "x" * 10**5,
                [{"role": "user"}],
                [{"role": ["x"], "content": 1}],
                float("nan"),
                True,
                [[[]]],
                "\ud800",
            ]
        )
    if rng.random() < 0.3:
        rows.insert(rng.randrange(len(rows)), rng.choice([None, 3, "text", [], {}, [1]]))
    return rows


def as_lines(rng: random.Random) -> bytes:
    return "\n".join(json.dumps(row) for row in comparisons(rng)).encode()


def as_list(rng: random.Random) -> bytes:
    return json.dumps(comparisons(rng), indent=rng.choice([None, 1])).encode()


def as_parquet(rng: random.Random) -> bytes:
    rows = [
        {"prompt": f"How {n}?", "chosen": f"good {n}", "rejected": rng.choice([f"bad {n}"] * 20 + ["", None])}
        for n in range(QUESTIONS)
    ]
    names = rng.choice([["prompt", "chosen", "rejected"]] * 6 + [["prompt", "chosen"], ["a", "b", "c"]])
    buffer = io.BytesIO()
    pq.write_table(
        pa.table({name: [list(row.values())[k] for row in rows] for k, name in enumerate(names)}), buffer
    )
    return buffer.getvalue()


def as_dialogues(rng: random.Random) -> bytes:
    rows = []
    for n in range(QUESTIONS):
        before = f"\n\nHuman: how {n}?\n\nAssistant:"
        row: dict[str, Any] = {"chosen": f"{before} good {n}", "rejected": f"{before} bad {n}"}
        if rng.random() < 0.05:
            row[rng.choice(list(row))] = rng.choice(
                ["", None, 5, "\n\nHuman:", "\n\nAssistant:", before * 50, "\x00" * 9, "\n\nHuman: x"]
            )
        rows.append(row)
    return gzip.compress("\n".join(map(json.dumps, rows)).encode())


def as_preferences(rng: random.Random) -> bytes:
    rows = []
    for n in range(QUESTIONS):
        answers: list[Any] = [
            {
                "answer_id": 10 * n + k,
                "pm_score": k,
                "selected": k == 2,
                "text": f"<p>way {k}</p>",
                "author": "A",
            }
            for k in range(3)
        ]
        row: dict[str, Any] = {
            "qid": n,
            "question": f"<p>How {n}?</p>",
            "answers": answers,
            "metadata": [f"https://s.example/q/{n}", "https://s.example"],
        }
        if rng.random() < 0.1:
            answers[0][rng.choice(list(answers[0]))] = rng.choice(
                [None, "x", -1, 10**30, float("inf"), [], NASTY_HTML[0]]
            )
        if rng.random() < 0.05:
            row[rng.choice(list(row))] = rng.choice([None, "x", 5, [], [None], [5], ["http://["], {}])
        rows.append(row)
    return "\n".join(map(json.dumps, rows)).encode()


def conversations(rng: random.Random) -> list[Any]:
    """Return rows of one published shape, some with a nasty value, or without one, at any depth."""
    examples = rng.choice(list(SHAPES.values()))[0]
    rows = []
    for n in range(QUESTIONS):
        row = json.loads(json.dumps(examples[n % len(examples)]).replace(ASKED, f"{ASKED} {n}"))
        if rng.random() < 0.1:
            hurt(row, rng)
        rows.append(row)
    if rng.random() < 0.9:  # without comparisons most files are refused
        rows += [{"prompt": f"Who {n}?", "chosen": "good", "rejected": "bad"} for n in range(4 * QUESTIONS)]
    return rows


def hurt(value: Any, rng: random.Random) -> None:
    """Replace, remove or repeat one value inside a dictionary or list."""
    places = list(value) if isinstance(value, dict) else range(len(value))
    place = rng.choice(places)
    inner = value[place]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
        hurt(inner, rng)
    elif rng.random() < 0.7:
        value[place] = rng.choice(NASTY_VALUES)
    elif isinstance(value, list):
        value.insert(place, inner)
    else:
        del value[place]


def as_conversations(rng: random.Random) -> bytes:
    return "\n".join(map(json.dumps, conversations(rng))).encode()


KINDS: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "Posts.xml": ("stack-exchange", as_xml),
    "Posts.7z": ("stack-exchange", as_archive),
    "Posts.csv": ("stack-exchange", as_csv),
    "Posts.csv.gz": ("stack-exchange", lambda rng: gzip.compress(as_csv(rng))),
    "own.jsonl": ("own", as_lines),
    "own.json": ("own", as_list),
    "own.parquet": ("own", as_parquet),
    "conversations.jsonl": ("own", as_conversations),
    "hh.jsonl.gz": ("hh-rlhf", as_dialogues),
    "preferences.jsonl": ("stack-exchange-preferences", as_preferences),
}


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes, most of the time with one thing wrong."""
    size = len(content)
    place, length = rng.randrange(size), rng.randrange(1, 1 + size // 4)
    match rng.randrange(12):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes(length) + content[place:]
        case 2:
            return content[:place] + rng.randbytes(length) + content[place + length :]
        case 3:
            return content[:place] + content[place + length :]
        case 4:
            return content[:place] + content[max(0, place - length) : place] * 3 + content[place:]
        case 5:
            flipped = bytearray(content)
            for _ in range(8):
                flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
            return bytes(flipped)
    return content


def try_all(name: str, folder: Path, cases: int = CASES) -> None:
    """Run every case of a kind, and print a line for each."""
    from tasks.config.jobs import DataJob
    from tasks.programs.data import prepare
    from tasks.programs.runtime.program import Run
    from tasks.system.errors import InputError

    kind, make = KINDS[name]
    for number in range(cases):
        rng = random.Random(f"{name}/{number}")
        place = folder / str(number)
        place.mkdir()
        path = place / name
        path.write_bytes(damaged(make(rng), rng))
        job = {"seed": 0, "source": {"kind": kind, "path": str(path)}, "data": {"max_bad_share": 1.0}}
        (place / "job.json").write_text(
            json.dumps({"stage": "data", "job": job, "inputs": {"source": str(path)}})
        )
        run = Run(place)
        try:
            prepare(DataJob.model_validate(run.record), run)
            card = json.loads((run.artifact / "card.json").read_text())
            lines = (run.artifact / "quarantine.jsonl").read_text().splitlines()
            told = {
                "rows": card["rows_seen"],
                "told": sum(card["read"].values()),
                "quarantined": sum(card["quarantined"].values()),
                "lines": len(lines),
            }
            told |= {"other": card["dropped"].get("post types other than question and answer", 0)}
        except InputError as error:
            told = {"refused": str(error), "left": [file.name for file in run.artifact.glob("*")]}
        print(json.dumps({"case": number, **told}), flush=True)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_inputs_are_read_to_the_last_row_or_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.dataset.test_fuzz", name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert (done.returncode, len(results)) == (0, CASES), f"case {len(results)}: {done.stderr[-2000:]}"
    for result in results:
        if "refused" in result:
            assert len(result["refused"].splitlines()) == 1, result
            assert result["refused"].endswith("."), result
            assert result["left"] == [], result
        else:
            assert result["lines"] == result["quarantined"], result
            if KINDS[name][0] == "stack-exchange":
                assert result["rows"] == result["told"] + result["other"] + result["quarantined"], result
    refused = sum("refused" in result for result in results)
    assert 0 < refused < CASES - 20, "the cases are all alike"
    assert sum(result.get("quarantined", 0) for result in results), "no row was bad"


if __name__ == "__main__":
    try_all(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
