"""Comparisons, ratings and plain answers that come one by one, gathered into questions: what has the same prompt is one question."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tasks.rlhf.questions import Answer, Question, identity, levels


class _Group:
    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.url = ""
        self.split = ""
        self.texts: dict[int, str] = {}  # by identity
        self.wins: set[tuple[int, int]] = set()  # identities of the better and the worse answer
        self.ratings: dict[int, float] = {}

    def note(self, text: str) -> int:
        number = identity(text)
        self.texts[number] = text
        return number


class Note(NamedTuple):
    """What one row says of a prompt: that an answer is better than another, how it is rated (a number instead of the other), or that it is there."""

    prompt: str
    answer: str
    other: str | float | None
    url: str
    split: str


class Gathered:
    """Notes of one source, by the identities of their prompts; the same questions whatever order they come in."""

    def __init__(self, site: str, licence: str, notes: Iterable[tuple[int, Note]] = ()) -> None:
        self.site, self.licence = site, licence
        self.notes = list(notes)

    def compare(self, prompt: str, better: str, worse: str, *, url: str = "", split: str = "") -> None:
        self.notes.append((identity(prompt), Note(prompt, better, worse, url, split)))

    def rate(self, prompt: str, answer: str, rating: float, *, split: str = "") -> None:
        self.notes.append((identity(prompt), Note(prompt, answer, float(rating), "", split)))

    def answer(self, prompt: str, answer: str, *, split: str = "") -> None:
        """An answer that nothing is known about but that it is worth learning from."""
        self.notes.append((identity(prompt), Note(prompt, answer, None, "", split)))

    def _groups(self) -> dict[int, _Group]:
        groups: dict[int, _Group] = {}
        for question_id, note in self.notes:
            group = groups.setdefault(question_id, _Group(note.prompt))
            group.url = min(group.url or note.url, note.url or group.url)
            group.split = max(group.split, note.split)
            number = group.note(note.answer)
            if isinstance(note.other, str):
                group.wins.add((number, group.note(note.other)))
            elif note.other is not None:
                group.ratings[number] = max(note.other, group.ratings.get(number, note.other))
        return groups

    def questions(self, dropped: Counter[str]) -> Iterator[Question]:
        """By id. Where a prompt's answers are compared, that counts and ratings do not; answers that beat each other are not compared."""
        for question_id, group in sorted(self._groups().items()):
            numbers = sorted(group.texts)
            place = {number: index for index, number in enumerate(numbers)}
            pairs = {(place[better], place[worse]) for better, worse in group.wins}
            heights, contradicting = levels(pairs)
            dropped["comparisons that contradict each other"] += len(contradicting)
            scores = [float(heights.get(i, 0)) if pairs else group.ratings.get(number, 0.0) for i, number in enumerate(numbers)]
            answers = tuple(Answer(n, s, 0, False, "", group.texts[n], "", "", self.licence) for n, s in zip(numbers, scores, strict=True))
            compared = tuple(sorted(pairs - contradicting)) if pairs else None
            yield Question(question_id, group.prompt, "", self.site, group.url, "", self.licence, answers, compared, group.split)
