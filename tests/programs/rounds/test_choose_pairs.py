"""Test how pairs are made and chosen."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from tasks.programs.rounds.choose_pairs import (
    Pair,
    choose,
    decided,
    disagreement,
    distinct_answers,
    jaccard,
    pair_id,
    pair_up,
    word_runs,
)
from tests.programs.rounds.rows import candidate

ANSWERS = ["list all files", "copy the two files", "remove a user now", "print the last lines", "show ports"]
ROWS = [candidate(number, f"{answer} {number}", draw=draw) for number in range(60) for draw, answer in
        enumerate(ANSWERS)]  # fmt: skip


def names(pairs: list[Pair]) -> list[str]:
    return [pair.pair_id for pair in pairs]


def test_disagreement_is_the_deviation_of_the_members_probabilities() -> None:
    first = np.array([[1.0, 1.0], [1.0, 0.0], [50.0, -50.0], [3.0, 3.0]])
    second = np.array([[0.0, 0.0], [0.0, 1.0], [-50.0, 50.0], [2.0, 1.0]])
    # sigmoid(1) = .7311, sigmoid(-1) = .2689: half their difference is .2311; sigmoid(2) = .8808
    assert disagreement(first, second) == pytest.approx([0.0, 0.2311, 0.5, (0.8808 - 0.7311) / 2], abs=1e-4)
    assert disagreement(second, first) == pytest.approx(disagreement(first, second))


def test_pairs_that_all_members_decide_the_same_way_are_decided() -> None:
    first = np.array([[3.0, 3.0], [-3.0, -3.0], [3.0, -3.0], [3.0, 1.0]])
    assert decided(first, np.zeros((4, 2)), confidence=0.9).tolist() == [True, True, False, False]


def test_every_pair_of_a_questions_answers_is_made_once() -> None:
    pairs = pair_up(ROWS, alike=0.9)
    assert len(pairs) == len(set(names(pairs))) == 60 * 10
    assert {pair.first["question_id"] for pair in pairs} == set(range(60))
    assert all(pair.first["question_id"] == pair.second["question_id"] == pair.question_id for pair in pairs)
    pair = pairs[0]
    assert pair.pair_id == pair_id(pair.prompt, pair.first["answer"], pair.second["answer"])


def test_pairs_and_choice_do_not_depend_on_the_order_of_rows() -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    assert pair_up(shuffled, alike=0.9) == pair_up(ROWS, alike=0.9)
    chosen = [
        choose(pairs, by="random", count=50, per_question=2, seed=3)
        for pairs in (pair_up(ROWS, alike=0.9), pair_up(ROWS, alike=0.9)[::-1])
    ]
    assert chosen[0] == chosen[1]


def test_which_of_like_answers_is_kept_does_not_depend_on_the_order_of_rows() -> None:
    rows = [candidate(1, "a b c d e", policy=policy, draw=draw) for policy in ("policy", "policy2")
            for draw in (1, 0)]  # fmt: skip
    rows += [candidate(1, "something else entirely", policy="policy2", draw=2)]
    for shuffled in (rows, rows[::-1]):
        (pair,) = pair_up(shuffled, alike=0.9)
        assert {(row["policy"], row["draw"]) for row in (pair.first, pair.second)} == {
            ("policy", 0), ("policy2", 2),
        }  # fmt: skip


def test_which_answer_is_first_depends_on_the_texts_alone() -> None:
    for number in range(20):
        texts = [f"list all files {number}", f"copy the two files {number}"]
        (pair,), (turned,) = (
            pair_up([candidate(1, text, draw=draw) for draw, text in enumerate(some)], alike=0.9)
            for some in (texts, texts[::-1])
        )
        assert pair.first["answer"] == turned.first["answer"]


def test_sides_say_nothing_about_policies() -> None:
    rows = [candidate(number, "first answer of all", policy="policy") for number in range(400)]
    rows += [candidate(number, "second one entirely", policy="policy2") for number in range(400)]
    sides = Counter(pair.first["policy"] for pair in pair_up(rows, alike=0.9))
    assert abs(sides["policy"] - 200) < 3 * 10  # of 400 fair coins the deviation is 10


def test_a_pair_is_the_same_whichever_answer_is_named_first() -> None:
    assert pair_id("q", "a", "b") == pair_id("q", "b", "a") != pair_id("p", "a", "b")
    assert len(pair_id("q", "a", "b")) == 32


def test_answers_are_alike_by_their_three_word_runs() -> None:
    # runs a-b-c b-c-d and a-b-c b-c-e: 1 of 3 in common
    assert jaccard(word_runs("a b c d"), word_runs("a b c e")) == pytest.approx(1 / 3)
    assert word_runs("a  b\n") == {("a", "b")}
    assert jaccard(word_runs(""), word_runs("")) == 1.0
    rows = [candidate(1, text, draw=draw) for draw, text in enumerate(["a b c d", "a b c e", "a b  c d"])]
    assert [row["draw"] for row in distinct_answers(rows, alike=0.9)] == [0, 1]
    assert [row["draw"] for row in distinct_answers(rows, alike=0.3)] == [0]


def test_alike_answers_are_never_asked_against_each_other() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    rows = [candidate(1, " ".join([*words, ending]), draw=n) for n, ending in enumerate(("a", "b", "a"))]
    rows += [candidate(1, "something else entirely", draw=9)]
    texts = [{pair.first["draw"], pair.second["draw"]} for pair in pair_up(rows, alike=0.8)]
    assert texts == [{0, 9}]  # of 13 runs 10 are common to 12 in all: .83
    assert len(pair_up(rows, alike=0.9)) == 3, "only the equal ones are one answer"


def test_of_a_question_only_so_many_pairs_are_chosen_and_none_twice() -> None:
    pairs = pair_up(ROWS, alike=0.9)
    for limit in (1, 3):
        chosen = choose(pairs, by="random", count=10_000, per_question=limit, seed=0)
        assert set(Counter(pair.question_id for pair in chosen).values()) == {limit}
    assert len(choose(pairs, by="random", count=7, per_question=1, seed=0)) == 7


def test_random_choice_depends_on_the_seed_and_is_even() -> None:
    pairs = pair_up(ROWS, alike=0.9)
    first, second = (choose(pairs, by="random", count=60, per_question=9, seed=seed) for seed in (0, 1))
    assert names(first) != names(second)
    shared = len({*names(first)} & {*names(second)})
    assert shared < 18  # of 60 and 60 of 600, 6 are expected; 5 deviations of 2.2 above


def test_where_members_disagree_most_is_asked_first() -> None:
    pairs = [
        pair._replace(disagreement=number % 5 / 10) for number, pair in enumerate(pair_up(ROWS, alike=0.9))
    ]
    chosen = choose(pairs, by="disagreement", count=200, per_question=10, seed=0)
    values = [pair.disagreement or 0 for pair in chosen]
    assert values == sorted(values, reverse=True)
    assert values.count(0.4) == 120
    ties = names(chosen)[:120]
    assert ties != sorted(ties), "equal ones are in a drawn order"


def test_margin_is_the_difference_of_rewards() -> None:
    rows = [candidate(1, "a b c", reward=2.0, rewards=[1.0]), candidate(1, "d e f", draw=1, reward=0.5)]
    (pair,) = pair_up(rows, alike=0.9)
    assert pair.margin == (1.5 if pair.first["answer"] == "a b c" else -1.5)
    assert all(pair.margin is None for pair in pair_up(ROWS, alike=0.9))
    assert len([*combinations(ANSWERS, 2)]) == 10
