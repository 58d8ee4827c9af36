"""Prompts that say nearly the same: against all pairs compared one by one, on made-up texts and on every real set."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from tasks.dataset.curation import near_duplicates
from tasks.dataset.curation.near_duplicates import jaccard
from tasks.dataset.question import Question
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import read_rows
from tasks.dataset.sources import hh_rlhf, stack_exchange_sets
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.splits import normalise_words
from tests.support.dumps import build_questions, iter_posts
from tests.support.paths import SHARED
from tests.support.split_assignments import assign_splits, groups

DATA = SHARED / "data"
SHARES = {"finetune": 0.34, "reward": 0.43, "rl": 0.1, "evaluation": 0.13}


def alike(texts: list[str], threshold: float) -> set[tuple[int, int]]:
    """Every pair (i < j) that is alike, by a product of matrices instead of sketches and sets."""
    columns: dict[str, int] = {}
    held = [
        sorted({columns.setdefault(" ".join(run), len(columns)) for run in runs(text.split())})
        for text in texts
    ]
    indices = np.concatenate([np.array(row, dtype=np.int64) for row in held])
    pointers = np.concatenate([[0], np.cumsum([len(row) for row in held])])
    matrix = csr_matrix((np.ones(len(indices)), indices, pointers), shape=(len(texts), len(columns)))
    shared = (matrix @ matrix.T).tocoo()
    sizes = np.array([len(row) for row in held])
    index = shared.data / (sizes[shared.row] + sizes[shared.col] - shared.data)
    return {
        (int(i), int(j))
        for i, j in zip(shared.row[index >= threshold], shared.col[index >= threshold], strict=True)
        if i < j
    }


def runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words)] if len(words) < 3 else list(zip(words, words[1:], words[2:], strict=False))


def components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    first = list(range(count))
    for _ in range(count):
        before = list(first)
        for i, j in pairs:
            first[i] = first[j] = min(first[i], first[j])
        if first == before:
            break
    return first


def shingles(text: str) -> frozenset[int]:
    return frozenset(near_duplicates.build_sketches([text]).shingles.tolist())


def test_shingles_and_their_index_by_hand() -> None:
    assert len(shingles("a b c d")) == 2
    assert shingles("a b c d") == shingles("a b c") | shingles("b c d")
    assert (
        len(
            {
                shingles(text)
                for text in (
                    "a b",
                    "b a",
                    "a",
                    "b",
                    "a a",
                    "a b c",
                    "c b a",
                    "a a a",
                    "a a b",
                    "a b a",
                    "b a a",
                )
            }
        )
        == 11
    )
    assert len(shingles("")) == 1
    assert shingles("a a a a a") == shingles("a a a")
    assert jaccard(shingles("a b c d e"), shingles("b c d e f")) == 2 / 4
    assert jaccard(shingles("a b c"), shingles("a b c")) == 1


def test_alike_texts_are_linked_through_others() -> None:
    words = [f"w{k}" for k in range(40)]
    texts = [" ".join(words[k : k + 30]) for k in (0, 2, 4)] + ["something else altogether here"]
    assert (
        jaccard(shingles(texts[0]), shingles(texts[1]))
        >= 0.8
        > jaccard(shingles(texts[0]), shingles(texts[2]))
    )
    assert groups(texts, 0.8) == [0, 0, 0, 3]
    assert groups(texts, 0.95) == [0, 1, 2, 3]


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=30, unique=True),
    st.sampled_from([0.7, 0.8, 0.9]),
)
def test_groups_are_those_of_all_pairs(texts: list[str], threshold: float) -> None:
    assert groups(texts, threshold) == (components(len(texts), alike(texts, threshold)) if texts else [])


def test_order_changes_no_group() -> None:
    texts = [" ".join(f"w{(7 * k + n) % 50}" for n in range(25)) for k in range(60)]
    order = random.Random(0).sample(range(60), 60)
    found, other = groups(texts, 0.8), groups([texts[k] for k in order], 0.8)
    assert {frozenset(k for k in range(60) if found[k] == leader) for leader in found} == {
        frozenset(order[k] for k in range(60) if other[k] == leader) for leader in other
    }


def dump(name: str) -> Callable[[], list[Question]]:
    path = DATA / "stackexchange" / name
    return lambda: [q for q in build_questions(iter_posts(path), Counter(), site="s") if q.prompt]


def rows(path: Path, gather: Callable[..., AnswerGroups]) -> Callable[[], list[Question]]:
    return lambda: list(gather(read_rows(path, Quarantine())).questions(Counter()))


HH = DATA / "hh-rlhf" / "harmless-base-dev.jsonl.gz"
REAL = {
    "travel": dump("travel/Posts.csv.gz"),
    "ai": dump("ai/Posts.xml"),
    "stackoverflow-2008": dump("stackoverflow-2008/Posts.xml"),
    "hh, single turn": rows(
        HH, lambda found: hh_rlhf.group_rows(found, Counter(), Quarantine(), one_turn=True)
    ),
    "hh, all turns": rows(
        HH, lambda found: hh_rlhf.group_rows(found, Counter(), Quarantine(), one_turn=False)
    ),
    "paired": rows(
        DATA / "stackexchange" / "stack_exchange_paired_tiny.json",
        lambda found: stack_exchange_sets.group_pairs(found, Quarantine()),
    ),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of shared/data is not on this machine")
@pytest.mark.parametrize("name", REAL)
def test_no_near_duplicate_is_in_two_splits_of_a_real_set(name: str) -> None:
    prompts = [(question.id, question.prompt) for question in REAL[name]()]
    # few sets have any of their own: every tenth question is asked once more, in nearly the same words
    more = [
        (10**18 + number, f"{prompt} Thanks a lot!")
        for number, (_, prompt) in enumerate(prompts)
        if number % 10 == 0
    ]
    prompts += [(number, text) for number, text in more if len(text.split()) > 30]
    splits = assign_splits(prompts, SHARES, alike=0.8)
    pairs = alike([normalise_words(text) for _, text in prompts], 0.8)
    assert pairs
    assert [(prompts[i], prompts[j]) for i, j in pairs if splits[i] != splits[j]] == []


def test_the_sketch_misses_what_the_documentation_says() -> None:
    """1 - (1 - s^4)^32 of the pairs of index s share a band: s = 0.5 is nearly always seen, s = 0.2 hardly ever."""
    seen = {}
    for shared, own in ((60, 30), (30, 60)):
        count = 0
        for trial in range(200):
            first, second = range(shared + own), [*range(shared), *range(1000, 1000 + own)]
            bands = near_duplicates.build_sketches(
                [
                    " ".join(f"{trial}.{k} {trial}.{k}a {trial}.{k}b" for k in numbers)
                    for numbers in (first, second)
                ]
            ).bands
            count += bool((bands[:, 0] == bands[:, 1]).any())
        seen[round(shared / (shared + 2 * own), 2)] = count / 200
    assert seen[0.5] == pytest.approx(1 - (1 - 0.5**4) ** 32, abs=0.08)
    assert seen[0.2] == pytest.approx(1 - (1 - 0.2**4) ** 32, abs=0.08)
