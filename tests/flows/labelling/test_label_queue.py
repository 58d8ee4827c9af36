"""Test which pair a rater labels next, and what the browser is told of it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.labelling import label_queue
from flows.labelling.label_queue import HELD_SECONDS, LabelQueue, order_sides
from tasks.rounds.label_log import Label, append_rows, read_labels
from tasks.system.errors import InputError
from tests.tasks.rounds.made_rounds import make_pairs


def make_queue(folder: Path, count: int, *, gold: int = 0, overlap: float = 0.0, **more: Any) -> LabelQueue:
    return LabelQueue(folder, make_pairs(count, gold=gold), overlap=overlap, title="round 1", **more)


def label_all(queue: LabelQueue, rater: str, verdict: str = "tie") -> list[str]:
    """Label until there is nothing left for a rater; return the pairs."""
    seen, state = [], queue.show_next(rater)
    while state["pair"]:
        seen.append(state["pair"]["pair_id"])
        state = queue.label(rater, seen[-1], verdict, 1.0)
    return seen


def test_a_rater_gets_each_pair_once_and_others_the_gold_questions_and_the_overlap(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 400, gold=3, overlap=0.25)
    gold = {f"{number:032x}" for number in (397, 398, 399)}
    assert label_all(queue, "Ann") == [f"{number:032x}" for number in range(400)]
    again = label_all(queue, "Ben")
    assert gold <= set(again)
    assert 70 <= len(again) - 3 <= 130  # a quarter, drawn by hash
    assert set(label_all(queue, "Cat")) == gold  # two labels are enough for all others
    assert queue.is_complete


def test_the_side_on_the_screen_is_turned_into_the_answer(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 40)
    for _ in range(40):
        pair = queue.show_next("Ann")["pair"]
        left = "first" if pair["left"].startswith("Do it") else "second"
        assert order_sides(pair["pair_id"], "Ann")[0] == left
        queue.label("Ann", pair["pair_id"], "left", 2.5)
    labels = read_labels(tmp_path)
    assert all(one.verdict == one.shown_first and one.seconds == 2.5 for one in labels)
    assert {one.verdict for one in labels} == {"first", "second"}  # sides are not the tables'
    others = [order_sides(one.pair_id, "Ben")[0] for one in labels]
    assert others != [one.shown_first for one in labels]


def test_a_pair_on_a_screen_is_shown_to_nobody_else_until_it_is_left(tmp_path: Path) -> None:
    now = [0.0]
    queue = make_queue(tmp_path, 2, clock=lambda: now[0])
    first = queue.show_next("Ann")["pair"]["pair_id"]
    assert queue.show_next("Ann")["pair"]["pair_id"] == first
    second = queue.show_next("Ben")["pair"]["pair_id"]
    assert second != first
    state = queue.label("Ben", second, "skip", 1)
    assert (state["pair"], state["is_complete"]) == (None, False)
    now[0] = HELD_SECONDS + 1
    assert queue.show_next("Ben")["pair"]["pair_id"] == first


def test_two_raters_who_ask_at_the_same_time_get_different_pairs(tmp_path: Path) -> None:
    def read_clock() -> float:
        time.sleep(0.1)  # another thread goes on before the pair counts as shown
        return 0.0

    queue = make_queue(tmp_path, 2, clock=read_clock)
    with ThreadPoolExecutor(2) as pool:
        shown = list(pool.map(queue.show_next, ["Ann", "Ben"]))
    assert {state["pair"]["pair_id"] for state in shown} == {"0" * 32, f"{1:032x}"}


def test_a_skipped_pair_comes_last_and_to_another_rater_only(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 3)
    skipped = queue.show_next("Ann")["pair"]["pair_id"]
    state = queue.label("Ann", skipped, "skip", 1)
    assert state["done"] == 1
    assert skipped not in label_all(queue, "Ann")
    assert label_all(queue, "Ben") == [skipped]


def test_undo_withdraws_the_own_last_label_and_shows_its_pair_again(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 3)
    mine = queue.show_next("Ann")["pair"]["pair_id"]
    queue.label("Ann", mine, "left", 1)
    theirs = queue.show_next("Ben")["pair"]
    queue.label("Ben", f"{2:032x}", "tie", 1)
    assert theirs is not None
    state = queue.undo("Ann")
    assert (state["pair"]["pair_id"], state["own"], state["done"]) == (mine, 0, 1)
    assert [one.rater for one in read_labels(tmp_path)] == ["Ben"]
    assert queue.undo("Ann")["own"] == 0  # nothing left to undo


def test_a_label_is_kept_once_however_often_it_is_sent(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 2)
    for verdict in ("left", "right"):
        queue.label("Ann", "0" * 32, verdict, 1)
    assert len(read_labels(tmp_path)) == 1


def test_a_label_that_is_sent_twice_at_the_same_time_is_kept_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append_late(folder: Path, rows: list[Label]) -> None:
        time.sleep(0.1)  # another thread goes on before the label is in the log
        append_rows(folder, rows)

    monkeypatch.setattr(label_queue, "append_rows", append_late)
    queue = make_queue(tmp_path, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda verdict: queue.label("Ann", "0" * 32, verdict, 1), ["left", "right"]))
    assert len(read_labels(tmp_path)) == 1


def test_nothing_that_the_browser_gets_names_a_policy_or_a_known_answer(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 3, gold=3)
    state = queue.show_next("Ann")
    assert set(state) == {"round", "pair", "done", "total", "own", "is_complete"}
    assert set(state["pair"]) == {"pair_id", "question", "left", "right"}
    text = json.dumps(state)
    assert not [word for word in ("secret", "sft", "gold", "known", "margin") if word in text]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (("", "0" * 32, "left", 1), "A rater's name is 1 to 60 printable characters"),
        (("Ann", "f" * 32, "left", 1), "This round has no such pair"),
        (("Ann", "0" * 32, "first", 1), "There is no verdict 'first'"),
    ],
)
def test_bad_labels_are_refused(tmp_path: Path, call: tuple[Any, ...], sentence: str) -> None:
    queue = make_queue(tmp_path, 1)
    with pytest.raises(InputError, match=sentence):
        queue.label(*call)
    queue.closed = "The round has gone on."
    for late in (lambda: queue.label("Ann", "0" * 32, "left", 1), lambda: queue.undo("Ann")):
        with pytest.raises(InputError, match="has gone on"):
            late()
    assert read_labels(tmp_path) == []
