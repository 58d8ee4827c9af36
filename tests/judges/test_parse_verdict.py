"""Test how the verdict is read from a written reply: it is never guessed."""

import pytest

from tasks.judges.parse_verdict import parse_verdict

FIRST = [
    "A", "a", " A.\n", "(A)", "[[A]]", "**A**", "`A`", '"A"', "Answer A", "Response A.", "option a", "# A",
    "\\boxed{A}", "$\\boxed{\\text{A}}$", "> A",
    "Better: A", "More helpful: A", "more helpful: a", "**More helpful:** A", "Verdict: **A**",
    "Verdict: [[A]]", "Final answer: (A)", "My choice: Response A", "Preferred: A", "- Winner: A",
    "The better answer is: A", "The better answer is A", "The better response is A.", "I choose A.",
    "Overall, I prefer Response A over B", "Answer A is better.", "So A is clearly the better one.",
    "A is better than B.", "Verdict: A because B is wrong.", "Verdict: A - it solves the problem",
    '{"choice": "A"}', '{\n "reason": "B is wrong",\n "choice": "A"\n}',
    "Comparison: B is longer, A is right.\nMore helpful: A", "Better: B\nNo, on reflection:\nBetter: A",
    "1. Correctness: B\n2. Clarity: B\nVerdict: A", "Better: A or B\nA",
    "<think>Better: B\nB</think>\nBetter: A", "Better: A\n\nAnswer B: is wrong about tar.",
    "Antwort: A", "Besser: A", "Meilleure réponse : A", "Mejor respuesta: A", "Migliore: A", "Лучше: A",
    "答案:A", "更好的回答:A", "より良い回答: A", "정답: A", "More helpful: A\r\n", "More helpful: A\n\n",
]  # fmt: skip
TIES = [
    "tie", "Tie.", "Verdict: tie", "Verdict: **Tie**", "It's a tie.", "Better: neither", "Neither",
    "Neither is better.", "Verdict: draw", "Verdict: both equally good", "Better: equal",
]  # fmt: skip
UNPARSEABLE = [
    "", " \n", "...", "C", "AB", "A B", "A or B", "A and B", "A/B", "A, B", "A\nThe better answer: A or B",
    "### Response A\nClear.\n\n### Response B\nWrong.\n\nOverall, Response A is the more accurate one here.",
    "Better: A or B", "Better: A and B", "Better: both", "Better: C", "Better:", "Better: maybe A",
    "Verdict: not A",
    "Better: A\nBetter: both", "Verdict: A and B are equally wrong", "Neither answers the question.",
    "Neither A nor B is better.", "A is not better.", "A isn't better than B", "A might be better.",
    "Is A better?", "A is better, but B is longer.", "If speed matters, A is better.", "a is better",
    "Both answers are good.", "I cannot decide.", "As an AI model I do not judge.", "A great question!",
    "Answer A explains tar, answer B does not.", "Answer A: explains tar", "Correctness: A\nClarity: A",
    "The answer says: choose A", "Better answers would say more.", "<think>Better: A", "Better: A</think>",
    "Beide Antworten sind gut.", "Je ne sais pas.", "两个都好", "B. A is a wrong answer", "Vitamin B",
    "Plan A",
]  # fmt: skip


def swapped(text: str) -> str:
    """Return the text with the letters A and B exchanged where they stand alone."""
    names = {"A": "B", "B": "A", "a": "b", "b": "a"}
    words = "".join(char if char.isascii() and char.isalpha() else " " for char in text)
    chars = list(text)
    for place, char in enumerate(chars):
        around = (" " + words + " ")[place : place + 3]
        if char in names and around == f" {char} " and not text.startswith("It's a"):
            chars[place] = names[char]
    return "".join(chars)


@pytest.mark.parametrize("text", FIRST)
def test_a_stated_choice_is_read(text: str) -> None:
    assert parse_verdict(text) == "first"
    assert parse_verdict(swapped(text)) == "second"


@pytest.mark.parametrize("text", TIES)
def test_a_stated_tie_is_a_tie(text: str) -> None:
    assert parse_verdict(text) == "tie"


@pytest.mark.parametrize("text", UNPARSEABLE)
def test_what_states_no_choice_is_unparseable(text: str) -> None:
    assert parse_verdict(text) == "unparseable"
    assert parse_verdict(swapped(text)) == "unparseable"


def test_of_a_cut_reply_a_sole_letter_counts_only() -> None:
    assert parse_verdict(" A", is_complete=False) == "first"
    assert parse_verdict("tie", is_complete=False) == "tie"
    for text in ("Better: A", "A\nB", "A\nThe reason is", "A is better", "1. Correctness: A\n2.", ""):
        assert parse_verdict(text, is_complete=False) == "unparseable"


def test_a_long_reply_is_read_quickly() -> None:
    for part in ("better ", "A is ", ": ", "the answer ", "<think>", "( ", "1. "):
        assert parse_verdict(part * 20_000) == "unparseable"
