"""Group comparisons, ratings, labels and plain answers into questions by their prompt."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tasks.dataset.conversation import Messages
from tasks.dataset.question import Answer, Question, comparison_levels, text_id


class _Group:
    """What the rows say about the answers to one prompt."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.url = ""
        self.split = ""
        self.messages: Messages = ()
        self.texts: dict[int, str] = {}  # by id
        self.wins: set[tuple[int, int]] = set()  # ids of the better and the worse answer
        self.ratings: dict[int, float] = {}
        self.labels: dict[int, set[bool]] = {}  # whether an answer was labelled good

    def add(self, text: str) -> int:
        """Add an answer and return its id."""
        number = text_id(text)
        self.texts[number] = text
        return number


class AnswerRecord(NamedTuple):
    """What one row says about an answer to a prompt."""

    prompt: str
    answer: str
    value: str | float | bool | None  # the answer that it beats, its rating, whether it is good, or nothing
    url: str
    split: str
    messages: Sequence[Sequence[str]] = ()  # of the prompt, if it is a conversation


class AnswerGroups:
    """Answers of one source with the ids of their prompts.

    The questions do not depend on the order of the answers.
    """

    def __init__(self, site: str, licence: str, records: Iterable[tuple[int, AnswerRecord]] = ()) -> None:
        self.site, self.licence = site, licence
        self.records = list(records)

    def add_comparison(
        self,
        prompt: str,
        better: str,
        worse: str,
        *,
        url: str = "",
        split: str = "",
        messages: Messages = (),
    ) -> None:
        """Add two answers of which one is better."""
        self.records.append((text_id(prompt), AnswerRecord(prompt, better, worse, url, split, messages)))

    def add_rating(
        self, prompt: str, answer: str, rating: float, *, split: str = "", messages: Messages = ()
    ) -> None:
        """Add an answer with its rating."""
        record = AnswerRecord(prompt, answer, float(rating), "", split, messages)
        self.records.append((text_id(prompt), record))

    def add_label(
        self, prompt: str, answer: str, good: bool, *, split: str = "", messages: Messages = ()
    ) -> None:
        """Add an answer that is labelled good or bad."""
        record = AnswerRecord(prompt, answer, good, "", split, messages)
        self.records.append((text_id(prompt), record))

    def add_answer(self, prompt: str, answer: str, *, split: str = "", messages: Messages = ()) -> None:
        """Add an answer to learn from, about which nothing else is known."""
        self.records.append((text_id(prompt), AnswerRecord(prompt, answer, None, "", split, messages)))

    def _groups(self) -> dict[int, _Group]:
        groups: dict[int, _Group] = {}
        for question_id, record in self.records:
            group = groups.setdefault(question_id, _Group(record.prompt))
            group.url = min(group.url or record.url, record.url or group.url)
            group.split = max(group.split, record.split)
            group.messages = max(group.messages, tuple((role, text) for role, text in record.messages))
            number = group.add(record.answer)
            if isinstance(record.value, str):
                group.wins.add((number, group.add(record.value)))
            elif isinstance(record.value, bool):
                group.labels.setdefault(number, set()).add(record.value)
            elif record.value is not None:
                group.ratings[number] = max(record.value, group.ratings.get(number, record.value))
        return groups

    def questions(self, dropped: Counter[str]) -> Iterator[Question]:
        """Yield the questions by id.

        If a prompt's answers are compared, ratings and labels are ignored. Comparisons in which answers beat
        each other are dropped.
        """
        for question_id, group in sorted(self._groups().items()):
            numbers = _select_answers(group, dropped)
            if not numbers:
                continue
            yield self._build_question(question_id, group, numbers, dropped)

    def _build_question(
        self, question_id: int, group: _Group, numbers: list[int], dropped: Counter[str]
    ) -> Question:
        index = {number: i for i, number in enumerate(numbers)}
        pairs = {(index[better], index[worse]) for better, worse in group.wins}
        levels, contradicting = comparison_levels(pairs)
        dropped["comparisons that contradict each other"] += len(contradicting)
        answers = []
        for i, number in enumerate(numbers):
            score = float(levels.get(i, 0)) if pairs else _score(group, number)
            answers.append(self._build_answer(number, score, group.texts[number]))
        return Question(
            id=question_id,
            prompt=group.prompt,
            created="",
            site=self.site,
            url=group.url,
            author="",
            licence=self.licence,
            answers=tuple(answers),
            compared=tuple(sorted(pairs - contradicting)) if pairs else None,
            split=group.split,
            messages=group.messages,
        )

    def _build_answer(self, number: int, score: float, text: str) -> Answer:
        return Answer(
            id=number,
            score=score,
            votes=0,
            accepted=False,
            created="",
            text=text,
            url="",
            author="",
            licence=self.licence,
        )


def _select_answers(group: _Group, dropped: Counter[str]) -> list[int]:
    """Return the ids of the answers that are kept; none if every answer of the question is bad."""
    numbers = sorted(group.texts)
    compared = {number for pair in group.wins for number in pair}
    if group.ratings and not compared:
        without = {
            "answers without a score to a question whose others have one": set(numbers) - group.ratings.keys()
        }
    else:
        labels = {number: values for number, values in group.labels.items() if number not in compared}
        contradicting = {number for number, values in labels.items() if len(values) > 1}
        without = {"answers labelled both good and bad": contradicting}
        bad = {number for number, values in labels.items() if values == {False}}
        if compared:
            without["answers labelled bad to a question whose others are compared"] = bad
        elif bad and bad | contradicting >= set(numbers):
            dropped["questions whose every answer is labelled bad"] += 1
            return []
    for reason, answers in without.items():
        if answers:
            dropped[reason] += len(answers)
    left_out = set().union(*without.values())
    return [number for number in numbers if number not in left_out]


def _score(group: _Group, number: int) -> float:
    """Return an answer's rating; of answers without any, 0, and -1 if it is labelled bad."""
    return group.ratings.get(number, -1.0 if group.labels.get(number) == {False} else 0.0)
