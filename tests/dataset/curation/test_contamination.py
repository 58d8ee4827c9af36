"""Test that overlap with an evaluation set is found: against runs of words compared one by one, and on real
sets.
"""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset.curation.contamination import MIN_WORDS, NGRAM, collect_ngrams, overlaps, read_texts
from tasks.dataset.splits import normalise_words
from tasks.system.errors import InputError
from tests.support.dumps import build_questions, iter_posts
from tests.support.paths import SHARED

DATA = SHARED / "data"
BENCHMARKS = DATA / "benchmarks"
ALPHABET = (
    "Apple, banana; cherry date elderberry fig grape honeydew iris jackfruit kiwi lemon mango nectarine "
    "orange papaya"
)
WORDS = ALPHABET.split()
EIGHT = " ".join(WORDS[:8])
FILES = ("rows.jsonl", "rows.json", "rows.parquet", "rows.jsonl.gz", "rows.json.gz")


def runs(texts: Iterable[str], n: int) -> set[tuple[str, ...]]:
    """Return the runs of words that grams() hashes."""
    found = set()
    for words in (normalise_words(text).split() for text in texts):
        length = min(n, len(words))
        if length == n or length >= 8:
            found |= {tuple(words[k : k + length]) for k in range(len(words) - length + 1)}
    return found


def shares(text: str, held: set[tuple[str, ...]]) -> bool:
    words = normalise_words(text).split()
    return any(
        tuple(words[k : k + length]) in held
        for length in {len(run) for run in held}
        for k in range(len(words) - length + 1)
    )


def test_the_hash_of_a_run_by_hand() -> None:
    """The sum of the words' hashes, each times an odd number, modulo 2^64."""

    def digest(word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")

    words = "four score and seven years ago our fathers".split()
    expected = sum(digest(word) * (digest(f" {7 - place}") | 1) for place, word in enumerate(words)) % 2**64
    assert collect_ngrams(["Four score and seven years ago, our fathers …"]) == {8: {expected}}
    assert expected == 1017769850848568086


def test_long_texts_are_runs_short_ones_one_of_their_own_length_and_the_shortest_none() -> None:
    lengths = {
        length: {n: len(found) for n, found in collect_ngrams([" ".join(WORDS[:length])]).items()}
        for length in range(17)
    }
    assert lengths == {k: {} for k in range(8)} | {k: {k: 1} for k in range(8, 13)} | {
        13: {13: 1},
        14: {13: 2},
        15: {13: 3},
        16: {13: 4},
    }
    assert {n: len(found) for n, found in collect_ngrams([EIGHT, ALPHABET], 3).items()} == {3: 14}
    assert (NGRAM, MIN_WORDS) == (13, 8)
    assert collect_ngrams([]) == {}
    assert not overlaps(ALPHABET, collect_ngrams([]))


def test_thirteen_words_touch_and_twelve_do_not() -> None:
    held = collect_ngrams([ALPHABET])
    assert overlaps(f"See what I read: {' '.join(WORDS[2:15])}!", held)
    assert not overlaps(f"See what I read: {' '.join(WORDS[2:14])}!", held)
    assert not overlaps(" ".join([*WORDS[:12], "and", *WORDS[4:]]).replace("Apple", "apples"), held)
    assert not overlaps(" ".join(reversed(WORDS)), held)


@pytest.mark.parametrize("text", ["", " ", "?!", "\x00", "\ud800", "\ud800 " * 20, "🙂 " * 20])
def test_a_text_without_words_is_no_hindrance(text: str) -> None:
    held = collect_ngrams([EIGHT, ALPHABET, text])
    assert overlaps(text, held) == (len(text.split()) == 20)
    assert not overlaps(text, collect_ngrams([ALPHABET]))


def test_a_whole_short_text_touches_and_a_part_of_it_does_not() -> None:
    held = collect_ngrams([EIGHT, ALPHABET])
    assert overlaps(f"is this {EIGHT}?", held)
    assert not overlaps(" ".join(WORDS[:7]), held)
    assert not overlaps(" ".join(WORDS[1:9]), held)


TEXTS = st.lists(st.sampled_from("ab"), max_size=24).map(" ".join)


@given(st.lists(TEXTS, max_size=6), TEXTS, st.integers(1, 16))
def test_what_touches_is_what_shares_a_run(texts: list[str], text: str, n: int) -> None:
    assert overlaps(text, collect_ngrams(texts, n)) == shares(text, runs(texts, n))
    assert {length: len(found) for length, found in collect_ngrams(texts, n).items()} == Counter(
        map(len, runs(texts, n))
    )


@given(
    st.lists(st.text(max_size=60), max_size=5), st.text(st.characters(exclude_categories=()), max_size=200)
)
def test_a_text_touches_every_set_that_holds_it_or_what_it_is_a_part_of(others: list[str], text: str) -> None:
    for written in (text, f"{EIGHT} {text}"):
        held = collect_ngrams([*others, written])
        long = len(normalise_words(written).split()) >= MIN_WORDS
        assert overlaps(written, held) == long or shares(written, runs(others, NGRAM))
        assert overlaps(f"before {written} after", held) or not long
        assert overlaps(written, collect_ngrams([written, ALPHABET, *others])) or not long


@given(
    st.lists(
        st.sampled_from(["x", "Éa", "straße", "２", "don", "snake_case", "日本", "ǅ"]),
        min_size=8,
        max_size=30,
    ),
    st.data(),
)
def test_case_punctuation_and_spacing_do_not_matter(words: list[str], data: st.DataObject) -> None:
    between = data.draw(
        st.lists(
            st.text(" \n\t.,;:!?'\"()*-`„“", min_size=1, max_size=4), min_size=len(words), max_size=len(words)
        )
    )
    cases: list[Callable[[str], str]] = [str.upper, str.lower, str.casefold, str.title, str]
    case = data.draw(st.sampled_from(cases))
    changed = "".join(gap + case(word) for gap, word in zip(between, words, strict=True))
    assert collect_ngrams([changed]) == collect_ngrams([" ".join(words)])
    assert overlaps(changed, collect_ngrams([" ".join(words)]))


@given(st.lists(TEXTS, max_size=8), st.data())
def test_neither_order_nor_repetition_of_the_texts_matters(texts: list[str], data: st.DataObject) -> None:
    assert (
        collect_ngrams(data.draw(st.permutations(texts)))
        == collect_ngrams(texts * 2)
        == collect_ngrams(iter(texts))
    )


@pytest.mark.parametrize("name", FILES)
def test_every_string_of_a_row_is_found_however_deep(name: str, tmp_path: Path) -> None:
    long = [f"{EIGHT} {number}" for number in range(5)]
    rows = [
        {
            "id": 1,
            "question": long[0],
            "choices": {"text": [long[1], "short", EIGHT], "label": ["A", "B", "C"]},
            "gold": 0.5,
            "hint": None,
        },
        {"id": 2, "question": "…", "choices": {"text": [long[2]], "label": []}, "gold": 1.0, "hint": long[3]},
    ]
    write(tmp_path / name, rows)
    assert sorted(read_texts(tmp_path / name)) == sorted([EIGHT, *long[:4]])
    assert Counter(read_texts(tmp_path)) == Counter(read_texts(tmp_path / name))


def write(path: Path, rows: list[dict[str, object]]) -> None:
    text = json.dumps(rows) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def test_a_deeply_nested_row_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"a": ' + "[" * 400 + '{"b": ' * 400 + f'"{EIGHT}"' + "}" * 400 + "]" * 400 + "}"
    )
    assert list(read_texts(tmp_path)) == [EIGHT]


def test_lines_of_plain_text_alone_and_in_a_folder_with_rows(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "list.txt").write_bytes(f"\ufeff{EIGHT}\r\n\r\nshort\r\n{ALPHABET}".encode())
    assert [line.strip() for line in read_texts(tmp_path / "deep" / "list.txt")] == [EIGHT, ALPHABET]
    assert [line.strip() for line in read_texts(tmp_path)] == [EIGHT, ALPHABET]
    write(tmp_path / "rows.jsonl", [{"text": f"{EIGHT} in a row"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [line.strip() for line in read_texts(tmp_path)] == [EIGHT, ALPHABET, f"{EIGHT} in a row"]


def make(name: str, content: bytes) -> Callable[[Path], Path]:
    def into(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return into


@pytest.mark.parametrize(
    ("laid", "sentence"),
    [
        (lambda folder: folder / "none.txt", "does not exist"),
        (lambda folder: folder / "none", "does not exist"),
        (lambda folder: folder, "holds no file that ends in"),
        (make("x.csv", b"a,b"), "is in another format"),
        (make("x.jsonl", b""), "is empty"),
        (make("x.json", b'[{"text": "'), "damaged or truncated JSON list"),
        (make("x.parquet", b"PAR1..."), "damaged or truncated"),
        (make("x.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9]), "damaged or truncated gzip"),
        (make("x.txt", "völlig".encode("latin-1")), "is not a text in UTF-8 (.*): save it"),
        (make("x.txt", b""), "holds no text of 8 words or more"),
        (
            make("x.jsonl", b'{"text": "one two three four five six seven"}'),
            "holds no text of 8 words or more",
        ),
        (
            make("x.json", json.dumps({"data": [{"text": EIGHT}]}, indent=1).encode()),
            "7 of 7 rows of .*x.json cannot be read \\(rows that are not JSON",
        ),
        (
            make("x.jsonl", f'{{"text": "{EIGHT}"}}\n{{"tex'.encode()),
            "1 of 2 rows of .* \\(rows that are not JSON; the first: x.jsonl, row 2\\)",
        ),
        (make("x.json", f'["{EIGHT}"]'.encode()), "1 of 1 rows of .* \\(rows that are no objects"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    laid: Callable[[Path], Path], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        list(read_texts(laid(tmp_path)))
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of shared/data is not on this machine")
def test_real_benchmarks_touch_themselves_and_no_real_post_but_one_that_quotes_them() -> None:
    passages = list(read_texts(BENCHMARKS))
    assert len(passages) > 12_000
    held = collect_ngrams(passages)
    assert all(overlaps(text, held) for text in passages[::10])
    posts = iter_posts(DATA / "stackexchange" / "travel" / "Posts.csv.gz")
    questions = [question.prompt for question in build_questions(islice(posts, 2000), Counter(), site="s")]
    assert len(questions) > 300
    assert [text for text in questions if overlaps(text, held)] == []
    quoted = [
        f"{question}\n\n> {passage.upper()}\n"
        for question, passage in zip(questions, passages[::37], strict=False)
    ]
    assert all(overlaps(text, held) for text in quoted)
