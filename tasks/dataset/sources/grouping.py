"""Comparisons, ratings and plain answers that come one by one, gathered into questions: what has the same prompt is one question."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tasks.dataset.question import Answer, Question, comparison_levels, text_id


class _Group:
    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.url = ""
        self.split = ""
        self.texts: dict[int, str] = {}  # by identity
        self.wins: set[tuple[int, int]] = set()  # identities of the better and the worse answer
        self.ratings: dict[int, float] = {}
        self.labels: dict[int, set[bool]] = {}  # whether an answer was called good

    def note(self, text: str) -> int:
        number = text_id(text)
        self.texts[number] = text
        return number


class AnswerRecord(NamedTuple):
    """What one row says of a prompt's answer: which other it beats, or instead of the other its rating, whether it is good, or nothing."""

    prompt: str
    answer: str
    other: str | float | bool | None
    url: str
    split: str


class AnswerGroups:
    """Notes of one source, by the identities of their prompts; the same questions whatever order they come in."""

    def __init__(self, site: str, licence: str, notes: Iterable[tuple[int, AnswerRecord]] = ()) -> None:
        self.site, self.licence = site, licence
        self.notes = list(notes)

    def compare(self, prompt: str, better: str, worse: str, *, url: str = "", split: str = "") -> None:
        self.notes.append((text_id(prompt), AnswerRecord(prompt, better, worse, url, split)))

    def rate(self, prompt: str, answer: str, rating: float, *, split: str = "") -> None:
        self.notes.append((text_id(prompt), AnswerRecord(prompt, answer, float(rating), "", split)))

    def label(self, prompt: str, answer: str, good: bool, *, split: str = "") -> None:
        """Add an answer that somebody called good or bad."""
        self.notes.append((text_id(prompt), AnswerRecord(prompt, answer, good, "", split)))

    def answer(self, prompt: str, answer: str, *, split: str = "") -> None:
        """An answer that nothing is known about but that it is worth learning from."""
        self.notes.append((text_id(prompt), AnswerRecord(prompt, answer, None, "", split)))

    def _groups(self) -> dict[int, _Group]:
        groups: dict[int, _Group] = {}
        for question_id, note in self.notes:
            group = groups.setdefault(question_id, _Group(note.prompt))
            group.url = min(group.url or note.url, note.url or group.url)
            group.split = max(group.split, note.split)
            number = group.note(note.answer)
            if isinstance(note.other, str):
                group.wins.add((number, group.note(note.other)))
            elif isinstance(note.other, bool):
                group.labels.setdefault(number, set()).add(note.other)
            elif note.other is not None:
                group.ratings[number] = max(note.other, group.ratings.get(number, note.other))
        return groups

    def questions(self, dropped: Counter[str]) -> Iterator[Question]:
        """Yield them by id. Where a prompt's answers are compared, that counts, and neither scores nor labels do.

        Answers that beat each other are not compared.
        """
        for question_id, group in sorted(self._groups().items()):
            numbers = _select_answers(group, dropped)
            if not numbers:
                continue
            place = {number: index for index, number in enumerate(numbers)}
            pairs = {(place[better], place[worse]) for better, worse in group.wins}
            heights, contradicting = comparison_levels(pairs)
            dropped["comparisons that contradict each other"] += len(contradicting)
            scores = [
                float(heights.get(i, 0)) if pairs else _score(group, number)
                for i, number in enumerate(numbers)
            ]
            answers = tuple(
                Answer(n, s, 0, False, "", group.texts[n], "", "", self.licence)
                for n, s in zip(numbers, scores, strict=True)
            )
            compared = tuple(sorted(pairs - contradicting)) if pairs else None
            yield Question(
                question_id,
                group.prompt,
                "",
                self.site,
                group.url,
                "",
                self.licence,
                answers,
                compared,
                group.split,
            )


def _select_answers(group: _Group, dropped: Counter[str]) -> list[int]:
    """Return the answers that have a place among the others, by identity; a question without a good one has none."""
    numbers = sorted(group.texts)
    compared = {number for pair in group.wins for number in pair}
    if group.ratings and not compared:
        without = {
            "answers without a score to a question whose others have one": set(numbers) - group.ratings.keys()
        }
    else:
        labels = {number: said for number, said in group.labels.items() if number not in compared}
        torn = {number for number, said in labels.items() if len(said) > 1}
        without = {"answers labelled both good and bad": torn}
        bad = {number for number, said in labels.items() if said == {False}}
        if compared:
            without["answers labelled bad to a question whose others are compared"] = bad
        elif bad and bad | torn >= set(numbers):
            dropped["questions whose every answer is labelled bad"] += 1
            return []
    for reason, some in without.items():
        if some:
            dropped[reason] += len(some)
    left_out = set().union(*without.values())
    return [number for number in numbers if number not in left_out]


def _score(group: _Group, number: int) -> float:
    """Return an answer's rating; of answers without any, 0, and -1 if it is labelled bad."""
    return group.ratings.get(number, -1.0 if group.labels.get(number) == {False} else 0.0)
