"""Rows of candidates and of asked pairs."""

from typing import Any


def candidate(
    question: int, answer: str, *, policy: str = "sft", draw: int = 0, **more: Any
) -> dict[str, Any]:
    """Return a row of the candidates, without rewards."""
    about = {"question_id": question, "prompt": f"question {question}", "messages": None}
    row = about | {"policy": policy, "draw": draw, "answer": answer, "tokens": [1], "ended": True}
    return row | {"rewards": [], "reward": None} | more


def asked(name: str, *, known: str = "", question: int = 1, **more: Any) -> dict[str, Any]:
    """Return a row of the pairs that are asked, with the answers "NAME one" and "NAME two"."""
    texts = {"prompt": f"question {question}", "first": f"{name} one", "second": f"{name} two"}
    row = {"pair_id": name, "question_id": question, "messages": None, "known": known}
    return row | texts | {"first_policy": "sft", "second_policy": "sft", "chosen_by": "random"} | more
