"""Choose which pair a rater labels next, and keep the labels that raters give on the page.

A pair is shown to one rater, but for gold questions, which every rater answers, and a share of the pairs that
a second rater labels too, so that agreement can be measured. No rater labels a pair twice.
"""

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from tasks.rounds.label_log import (
    LOG,
    SKIP,
    Label,
    Side,
    Verdict,
    append_rows,
    count_labelled,
    new_label,
    read_labels,
    withdraw,
)
from tasks.rounds.label_rows import check_rater
from tasks.system.errors import InputError

HELD_SECONDS = 600.0  # for which a pair that is shown to one rater is shown to no other
MAX_SECONDS = 86_400.0
SIDES: tuple[Side, Side] = get_args(Side)
SHOWN = {"left": 0, "right": 1}  # a verdict in the browser, by the side on the screen
UNDONE = "undone by the rater"
Pair = Mapping[str, Any]


def share_of(purpose: str, *names: str) -> float:
    """Return a number from [0, 1) that depends on these texts alone."""
    digest = hashlib.sha256("\0".join([purpose, *names]).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def order_sides(pair_id: str, rater: str) -> tuple[Side, Side]:
    """Return which answer stands left and which right: the same for a rater each time, another for others."""
    return SIDES if share_of("side", pair_id, rater) < 0.5 else (SIDES[1], SIDES[0])


class LabelQueue:
    """The pairs of a round with the labels in its log; several threads may use it at the same time."""

    def __init__(
        self,
        folder: Path,
        asked: Sequence[Pair],
        *,
        overlap: float,
        title: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.title, self.overlap = folder, title, overlap
        self.closed = ""  # why no label is taken any more
        self._pairs = {str(pair["pair_id"]): pair for pair in asked}
        self._clock = clock
        self._holders: dict[str, tuple[str, float]] = {}  # rater and time by the pair that is shown
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int], list[Label]] = ((-1, -1), [])

    def labels(self) -> list[Label]:
        """Return the labels that hold, also those that other processes have written."""
        try:
            stat = (self.folder / LOG).stat()
        except FileNotFoundError:
            return []
        identity = (stat.st_size, stat.st_mtime_ns)
        if self._read[0] != identity:
            self._read = (identity, read_labels(self.folder))
        return self._read[1]

    @property
    def is_complete(self) -> bool:
        """Whether every pair has a label."""
        return count_labelled(self.labels(), self._pairs, with_skipped=True) == len(self._pairs)

    def show_next(self, rater: str) -> dict[str, Any]:
        """Return the rater's next pair with the progress, as the browser gets it. Raises InputError."""
        rater = check_rater(rater)
        with self._lock:
            return self._describe(rater, self._choose(rater))

    def label(self, rater: str, pair_id: str, verdict: str, seconds: Any) -> dict[str, Any]:
        """Keep a verdict: "left" or "right" on the screen, or one that names no side; return what is next.

        Raises InputError.
        """
        rater = check_rater(rater)
        if verdict not in SHOWN and verdict not in set(get_args(Verdict)) - {*SIDES}:
            raise InputError(f"There is no verdict {verdict!r}")
        if pair_id not in self._pairs:
            raise InputError("This round has no such pair: load the page again")
        taken = float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < MAX_SECONDS else None
        sides = order_sides(pair_id, rater)
        named = sides[SHOWN[verdict]] if verdict in SHOWN else verdict
        with self._lock:
            self._refuse_if_closed()
            if not any(one.pair_id == pair_id and one.rater == rater for one in self.labels()):
                made = new_label(pair_id, named, rater, seconds=taken, shown_first=sides[0])
                append_rows(self.folder, [made])
            self._holders.pop(pair_id, None)
            return self._describe(rater, self._choose(rater))

    def undo(self, rater: str) -> dict[str, Any]:
        """Withdraw the rater's last label, and return its pair as the next one. Raises InputError."""
        rater = check_rater(rater)
        with self._lock:
            self._refuse_if_closed()
            own = [one for one in self.labels() if one.rater == rater and one.pair_id in self._pairs]
            if not own:
                return self._describe(rater, self._choose(rater))
            withdraw(self.folder, own[-1:], why=UNDONE, by=rater)
            return self._describe(rater, own[-1].pair_id)

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise InputError(self.closed)

    def _choose(self, rater: str) -> str | None:
        """Return the first pair that is open to a rater, those that others have skipped last."""
        raters: dict[str, dict[str, str]] = defaultdict(dict)  # verdict by rater, by pair
        for one in self.labels():
            raters[one.pair_id][one.rater] = one.verdict
        mine = [name for name in self._pairs if rater not in raters[name] and not self._is_held(name, rater)]
        for name in mine:
            if not raters[name] or self._is_asked_again(name, len(raters[name])):
                return name
        return next((name for name in mine if {*raters[name].values()} == {SKIP}), None)

    def _is_held(self, pair_id: str, rater: str) -> bool:
        holder, since = self._holders.get(pair_id, (rater, 0.0))
        is_for_several = self._pairs[pair_id]["known"]
        return holder != rater and not is_for_several and self._clock() - since < HELD_SECONDS

    def _is_asked_again(self, pair_id: str, num_raters: int) -> bool:
        is_gold_question = bool(self._pairs[pair_id]["known"])
        return is_gold_question or (num_raters < 2 and share_of("overlap", pair_id) < self.overlap)

    def _describe(self, rater: str, pair_id: str | None) -> dict[str, Any]:
        """Return what the browser gets: nothing in it says who wrote an answer or which one is known."""
        labels = self.labels()
        done = count_labelled(labels, self._pairs, with_skipped=True)
        if pair_id:
            self._holders[pair_id] = (rater, self._clock())
        return {
            "round": self.title,
            "pair": self._show(pair_id, rater) if pair_id else None,
            "done": done,
            "total": len(self._pairs),
            "own": sum(one.rater == rater for one in labels),
            "is_complete": done == len(self._pairs),
        }

    def _show(self, pair_id: str, rater: str) -> dict[str, Any]:
        pair = self._pairs[pair_id]
        left, right = order_sides(pair_id, rater)
        turns = pair["messages"] or [{"role": "user", "content": pair["prompt"]}]
        question = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        return {"pair_id": pair_id, "question": question, "left": pair[left], "right": pair[right]}
