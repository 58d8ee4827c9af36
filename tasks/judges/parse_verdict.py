"""Read the verdict from a written reply. What does not say A, B or tie in so many words is unparseable."""

import re

from tasks.rlhf.judging.verdicts import Verdict

_VERDICTS: dict[str, Verdict] = {"a": "first", "b": "second"}
_THOUGHTS_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_THOUGHTS_START = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:boxed|text(?:bf)?)\b|[*_`#>\[\](){}\"'“”„«»「」【】$<,]")
_LIST_MARK = re.compile(r"^(?:[-•]|\d+[.)])\s+")
_NOUN = (
    r"(?:(?:the|assistant|answer|response|reply|option|antwort|réponse|respuesta|risposta|resposta)\s+){0,2}"
)
_LABEL = re.compile(rf"{_NOUN}([ab])", re.IGNORECASE)
_TIE = re.compile(
    r"(?:it is |it s )?(?:a )?(?:tie|draw)|tied|equal(?:ly good)?|both (?:are )?equally good"
    r"|neither(?: is better)?",
    re.IGNORECASE,
)
# What stands before the colon of a choice ("More helpful: A", not "Correctness: A"), in common languages.
_CHOICE = (
    r"better|\bbest\b|more helpful|prefer|choice|verdict|winner|answer\b(?! [ab]\b)|final|decision|judge?ment"
    r"|besser|antwort\b(?! [ab]\b)|urteil|entscheidung|meilleur|réponse\b(?! [ab]\b)|mejor"
    r"|respuesta\b(?! [ab]\b)|elección|migliore|risposta\b(?! [ab]\b)|melhor|resposta\b(?! [ab]\b)"
    r"|лучш|ответ|вердикт|更好|答案|选择|回答|良い|判定|選択|정답|선택"
)
_KEYED = re.compile(rf"(?=[^::]{{0,60}}[::])[^::]*(?:{_CHOICE})[^::]*[::]\s*(.*)", re.IGNORECASE)
_REASONED = re.compile(rf"(?i:{_NOUN})([AB]) (?:because|since|as it|-|–|—) ?.*")
_BETTER = r"(?:better|best|more helpful|preferable|preferred|the winner|superior)"
_SO = r"(?:(?:so|therefore|overall|thus|hence) )?"
_SENTENCES = [
    re.compile(rf"(?i:{_SO}{_NOUN})([AB]) (?i:is (?:(?:clearly|much|slightly|overall|the) )*{_BETTER}\b.*)"),
    re.compile(rf"(?i:{_SO}i (?:would )?(?:choose|prefer|pick) {_NOUN})([AB])(?i: over .*)?"),
    re.compile(
        rf"(?i:{_SO}(?:the|my) (?:{_BETTER}|final) (?:answer|response|reply|choice|one) is {_NOUN})([AB])"
    ),
]
_DOUBT = re.compile(
    r"\b(?:neither|nor|not|both|either|unless|if|whether|cannot|or|but|could|might|may)\b|\bn t\b|\w t\b|\?",
    re.IGNORECASE,
)


def parse_verdict(reply: str, *, is_complete: bool = True) -> Verdict:
    """Return what the last line that states a choice says.

    Of a reply that was cut, only a sole letter counts: what it would have said at its end is not known. If
    the last line that states a choice names none of them ("Better: A or B"), the reply is unparseable.
    """
    text = _THOUGHTS_END.split(reply)[-1]
    if _THOUGHTS_START.search(text):  # it was still thinking
        return "unparseable"
    lines = [line for line in map(_plain, text.splitlines()) if line]
    if not is_complete:
        return (_read_label(lines[0]) if len(lines) == 1 else None) or "unparseable"
    labels = {line: verdict for line in lines if (verdict := _read_label(line)) is not None}
    if len(set(labels.values())) > 1:  # headings, "Response A" and "Response B": only the last line chooses
        lines = [line for line in lines[:-1] if line not in labels] + lines[-1:]
    found = [verdict for line in lines if (verdict := _read_line(line)) is not None]
    return found[-1] if found else "unparseable"


def _plain(line: str) -> str:
    """Return a line without markup, list marks, and the stop at its end."""
    bare = " ".join(_MARKUP.sub(" ", line).split())
    return _LIST_MARK.sub("", bare).rstrip(" .!。;")


def _read_label(text: str) -> Verdict | None:
    """Return the verdict of a text that is a label and nothing else."""
    if match := _LABEL.fullmatch(text):
        return _VERDICTS[match[1].lower()]
    return "tie" if _TIE.fullmatch(text) else None


def _read_line(line: str) -> Verdict | None:
    """Return the verdict of a line, "unparseable" if it names no clear choice, None if it is no choice."""
    if verdict := _read_label(line):
        return verdict
    if keyed := _KEYED.fullmatch(line):
        return _read_label(keyed[1]) or _read_sentence(keyed[1], [_REASONED]) or "unparseable"
    return None if _DOUBT.search(line) else _read_sentence(line, _SENTENCES)


def _read_sentence(line: str, sentences: list[re.Pattern[str]]) -> Verdict | None:
    matches = (sentence.fullmatch(line) for sentence in sentences)
    return next((_VERDICTS[match[1].lower()] for match in matches if match), None)
