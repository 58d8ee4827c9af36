"""Comparisons, ratings and plain answers that come one by one, gathered into questions: what has the same prompt is one question."""

from collections import Counter
from collections.abc import Iterator

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


class Gathered:
    """Questions of one source; the same whatever order they come in."""

    def __init__(self, site: str, licence: str) -> None:
        self.site, self.licence = site, licence
        self.groups: dict[int, _Group] = {}

    def compare(self, prompt: str, better: str, worse: str, *, url: str = "", split: str = "") -> None:
        group = self._group(prompt, url, split)
        group.wins.add((group.note(better), group.note(worse)))

    def rate(self, prompt: str, answer: str, rating: float, *, split: str = "") -> None:
        group = self._group(prompt, "", split)
        number = group.note(answer)
        group.ratings[number] = max(rating, group.ratings.get(number, rating))

    def answer(self, prompt: str, answer: str, *, split: str = "") -> None:
        """An answer that nothing is known about but that it is worth learning from."""
        self._group(prompt, "", split).note(answer)

    def _group(self, prompt: str, url: str, split: str) -> _Group:
        group = self.groups.setdefault(identity(prompt), _Group(prompt))
        group.url = min(group.url or url, url or group.url)
        group.split = max(group.split, split)
        return group

    def questions(self, dropped: Counter[str]) -> Iterator[Question]:
        """By id. Where a prompt's answers are compared, that counts and ratings do not; answers that beat each other are not compared."""
        for question_id in sorted(self.groups):
            group = self.groups[question_id]
            numbers = sorted(group.texts)
            place = {number: index for index, number in enumerate(numbers)}
            pairs = {(place[better], place[worse]) for better, worse in group.wins}
            heights, contradicting = levels(pairs)
            dropped["comparisons that contradict each other"] += len(contradicting)
            scores = [float(heights.get(i, 0)) if pairs else group.ratings.get(number, 0.0) for i, number in enumerate(numbers)]
            answers = tuple(Answer(n, s, 0, False, "", group.texts[n], "", "", self.licence) for n, s in zip(numbers, scores, strict=True))
            compared = tuple(sorted(pairs - contradicting)) if pairs else None
            yield Question(question_id, group.prompt, "", self.site, group.url, "", self.licence, answers, compared, group.split)
