"""Build, filter, pair and count questions row by row: the reference for the data stage's columns.

Plain Python on one question at a time; tests/dataset/test_columns.py compares it with what the stage does.
"""

import hashlib
import math
import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from tasks.dataset.conversation import Messages, to_records, write_out
from tasks.dataset.curation.contamination import overlaps
from tasks.dataset.curation.language import detect_language
from tasks.dataset.curation.personal_data import mask_personal_data
from tasks.dataset.curation.rules import Rules
from tasks.dataset.question import Answer, Pair, Question, text_id
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.dataset.statistics import NUM_EXAMPLES, Statistics

Fields = dict[str, Any]
VERSION_3_FROM, VERSION_4_FROM = "2011-04-08", "2018-05-02"


def score_answer(votes: int, accepted: bool = False) -> int:
    """Return s(a) of an answer."""
    return (round(math.log2(1 + votes)) if votes >= 0 else -1) + accepted


def choose_licence(post: Post) -> str:
    """Return the licence that the dump names, else the one by date; without a date, the family's name."""
    if post.licence or not post.created:
        return post.licence or "CC BY-SA"
    if post.created < VERSION_3_FROM:
        return "CC BY-SA 2.5"
    return "CC BY-SA 3.0" if post.created < VERSION_4_FROM else "CC BY-SA 4.0"


def author_url(post: Post, site: str) -> str:
    """Return the author's page on the site, else the display name; "" for a deleted user without either."""
    return f"https://{site}/users/{post.author_id}" if post.author_id else post.author_name


def join_prompt(title: str, body: str) -> str:
    """Return title and body of a question; the title alone if the body adds nothing."""
    return title if title and body in ("", title) else f"{title}\n\n{body}".strip()


class NumberedPost(NamedTuple):
    """A post with its body in Markdown, and the number of its question."""

    question: int
    site: str
    post: Post


def number_post(post: Post, site: str, *, several_sites: bool = False) -> NumberedPost:
    """Return the post with the number of its question.

    With ``several_sites`` the number is a hash of the question's address, because ids of two sites may be
    equal.
    """
    number = post.parent or post.id
    return NumberedPost(
        text_id(question_url(site, number)) if several_sites else number,
        site,
        post._replace(body=to_markdown(post.body)),
    )


def question_url(site: str, question: int) -> str:
    """Return the address of a question's page."""
    return f"https://{site}/q/{question}"


def build_questions(posts: Iterable[NumberedPost], dropped: Counter[str]) -> Iterator[Question]:
    """Yield questions by number, each with its answers; ``dropped`` counts answers without a question."""
    questions, answers = _group_posts(posts, dropped)
    for number in sorted(questions):
        (post,) = questions[number].values()
        site, written = post.site, answers.pop(number, {})
        replies = tuple(
            _build_answer(written[answer_id].post, post.post, site) for answer_id in sorted(written)
        )
        yield _build_question(number, site, post.post, replies)
    dropped["answers whose question is missing"] += sum(map(len, answers.values()))


PostsByQuestion = dict[int, dict[int, NumberedPost]]  # by the question's number and the post's id


def _group_posts(
    posts: Iterable[NumberedPost], dropped: Counter[str]
) -> tuple[PostsByQuestion, PostsByQuestion]:
    questions: PostsByQuestion = defaultdict(dict)
    answers: PostsByQuestion = defaultdict(dict)
    for post in posts:
        group = (answers if post.post.parent else questions)[post.question]
        known = group.get(post.post.id)
        if known is not None:  # files overlap; the smaller tuple is kept, so that order does not matter
            dropped["repeated post ids"] += 1
            post = min(post, known)
        group[post.post.id] = post
    return questions, answers


def _build_question(number: int, site: str, post: Post, answers: tuple[Answer, ...]) -> Question:
    return Question(
        id=number,
        prompt=join_prompt(post.title, post.body),
        created=post.created,
        site=site,
        url=question_url(site, post.id),
        author=author_url(post, site),
        licence=choose_licence(post),
        answers=answers,
        author_name=post.author_name,
    )


def _build_answer(post: Post, question: Post, site: str) -> Answer:
    accepted = post.id == question.accepted
    return Answer(
        id=post.id,
        score=score_answer(post.votes, accepted),
        votes=post.votes,
        accepted=accepted,
        created=post.created,
        text=post.body,
        url=f"https://{site}/a/{post.id}",
        author=author_url(post, site),
        licence=choose_licence(post),
        author_name=post.author_name,
    )


def drop_unusable_answers(
    question: Question, dropped: Counter[str], *, min_chars: int = 1, max_chars: int = 2**31
) -> Question | None:
    """Return the question without answers of unfitting length and, of equal texts, all but the best.

    None if no answer is left. ``dropped`` counts the reasons.
    """
    if not question.prompt:
        dropped["questions without text"] += 1
        dropped["answers to questions without text"] += len(question.answers)
        return None
    kept = []
    for i, reason in enumerate(_iter_faults(question.answers, min_chars, max_chars)):
        if reason:
            dropped[reason] += 1
        else:
            kept.append(i)
    if not kept:
        dropped["questions without usable answers" if question.answers else "questions without answers"] += 1
        return None
    return keep_answers(question, kept)


def keep_answers(question: Question, kept: Sequence[int]) -> Question:
    """Return the question with only the answers at these indices, and the comparisons between them."""
    place = {old: new for new, old in enumerate(kept)}
    pairs = question.compared
    if pairs is not None:
        pairs = tuple((place[i], place[j]) for i, j in pairs if i in place and j in place)
    return question._replace(answers=tuple(question.answers[i] for i in kept), compared=pairs)


def _iter_faults(answers: Sequence[Answer], min_chars: int, max_chars: int) -> Iterator[str]:
    """Yield for each answer the reason why it is dropped, "" if it is kept."""
    first: dict[str, Answer] = {}
    for answer in sorted(answers, key=_preference_key):
        first.setdefault(answer.text, answer)
    for answer in answers:
        if not answer.text:
            yield "answers without text"
        elif len(answer.text) < min_chars:
            yield "answers too short"
        elif len(answer.text) > max_chars:
            yield "answers too long"
        else:
            yield "" if first[answer.text] is answer else "answers equal to another of the question"


def ranks(answers: Sequence[Answer]) -> list[int]:
    """Return the rank of each answer by its score, from 1.

    Equal scores share a rank; the next rank is one below.
    """
    scores = sorted({answer.score for answer in answers}, reverse=True)
    rank_of = {score: rank for rank, score in enumerate(scores, 1)}
    return [rank_of[answer.score] for answer in answers]


def count_pairs(question: Question) -> int:
    """Return the number of comparisons that can be drawn from the question."""
    if question.compared is not None:
        return len(question.compared)
    if len(question.answers) < 2:
        return 0
    scores = Counter(answer.score for answer in question.answers)
    return (len(question.answers) ** 2 - sum(count**2 for count in scores.values())) // 2


def draw_pairs(question: Question, *, max_pairs: int, seed: int) -> list[Pair]:
    """Draw the question's comparisons, at most ``max_pairs``.

    Without replacement, by a generator seeded from (seed, question id) alone.
    """
    if question.compared is None:
        return draw_comparisons(
            [answer.score for answer in question.answers],
            max_pairs=max_pairs,
            seed=seed,
            question_id=question.id,
        )
    pairs = sorted(question.compared)
    if len(pairs) <= max_pairs:
        return pairs
    return [pairs[k] for k in _draw_numbers(len(pairs), max_pairs, seed, question.id)]


def draw_comparisons(scores: Sequence[float], *, max_pairs: int, seed: int, question_id: int) -> list[Pair]:
    """Draw pairs (i, j) of indices with scores[i] > scores[j], at most ``max_pairs``, without replacement.

    The draw does not depend on partitions, order or the number of workers. The n^2 pairs are never held in
    memory: sorted by falling score, each answer wins against a tail of the list, so that a pair is computed
    from its number.
    """
    if len(scores) < 2:
        return []
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    losses = [-scores[i] for i in ranking]
    tails = [bisect_right(losses, loss) for loss in losses]  # first place that loses against this place
    ends = list(accumulate(len(scores) - tail for tail in tails))
    total = ends[-1]
    numbers = range(total) if total <= max_pairs else _draw_numbers(total, max_pairs, seed, question_id)
    places = ((bisect_right(ends, number), number) for number in numbers)
    return [(ranking[place], ranking[len(scores) - (ends[place] - number)]) for place, number in places]


def _draw_numbers(total: int, count: int, seed: int, question_id: int) -> list[int]:
    return sorted(random.Random(f"{seed}/{question_id}").sample(range(total), count))


def index_of_best(answers: Sequence[Answer]) -> int:
    """Return the index of the best answer: highest score, then accepted, then most votes, then oldest."""
    return min(range(len(answers)), key=lambda i: _preference_key(answers[i]))


def is_older(first: Answer, second: Answer) -> bool | None:
    """Return whether the first answer is older than the second; None if their age is unknown.

    Ids decide if the source has votes but no dates.
    """
    if not (first.created or first.votes or second.votes):
        return None  # then ids are hashes of the texts
    return (first.created, first.id) < (second.created, second.id)


def age_ranks(answers: Sequence[Answer]) -> list[int] | None:
    """Return the rank of each answer by age, the oldest 1; None if the source says nothing about age."""
    if not any(answer.created or answer.votes for answer in answers):
        return None
    order = sorted(range(len(answers)), key=lambda i: (answers[i].created, answers[i].id))
    return [order.index(i) + 1 for i in range(len(answers))]


def _preference_key(answer: Answer) -> tuple[float, bool, int, str, int]:
    return (-answer.score, not answer.accepted, -answer.votes, answer.created, answer.id)


def apply_rules(
    question: Question, rules: Rules, dropped: Counter[str], masked: Counter[str]
) -> Question | None:
    """Return the question as it is kept, or None.

    ``dropped`` counts by reason; ``masked`` counts personal data that was masked, by kind.
    """
    reason = _exclusion_reason(question, rules)
    if reason:
        dropped[reason] += 1
        dropped[f"answers to {reason}"] += len(question.answers)
        return None
    if rules.personal == "mask":
        question = _mask(question, masked)
    elif rules.personal == "drop":
        question = _drop_personal_answers(question, dropped)
    return drop_unusable_answers(
        question, dropped, min_chars=rules.min_answer_chars, max_chars=rules.max_answer_chars
    )


def _exclusion_reason(question: Question, rules: Rules) -> str:
    """Return the reason why a question is dropped, "" if it is kept."""
    if len(question.prompt) > rules.max_prompt_chars:
        return "questions too long"
    # "": code, or too little text to detect a language
    if rules.languages and detect_language(question.prompt) not in (*rules.languages, ""):
        return "questions in other languages"
    if rules.personal == "drop" and mask_personal_data(question.prompt)[1]:
        return "questions with personal data"
    if rules.evaluation_ngrams and overlaps(question.prompt, rules.evaluation_ngrams):
        return "questions of evaluation sets"
    return ""


def _mask(question: Question, masked: Counter[str]) -> Question:
    prompt, messages, counts = _mask_prompt(question)
    answers = []
    for answer in question.answers:
        text, more = mask_personal_data(answer.text)
        counts += more
        answers.append(answer if text is answer.text else answer._replace(text=text))
    masked.update(counts)
    if not counts:
        return question
    return question._replace(prompt=prompt, messages=messages, answers=tuple(answers))


def _mask_prompt(question: Question) -> tuple[str, Messages, Counter[str]]:
    """Return the masked prompt and messages; of a conversation the prompt is the masked messages."""
    if not question.messages:
        prompt, counts = mask_personal_data(question.prompt)
        return prompt, (), counts
    counts = Counter[str]()
    messages = []
    for role, text in question.messages:
        after, found = mask_personal_data(text)
        counts += found
        messages.append((role, after))
    prompt = write_out(messages) if counts else question.prompt
    return prompt, tuple(messages), counts


def _drop_personal_answers(question: Question, dropped: Counter[str]) -> Question:
    kept = [place for place, answer in enumerate(question.answers) if not mask_personal_data(answer.text)[1]]
    dropped["answers with personal data"] += len(question.answers) - len(kept)
    return keep_answers(question, kept)


def build_rows(
    question: Question, split: str, pairs: Sequence[Pair], sampled_of: int
) -> Iterator[tuple[str, Fields]]:
    """Yield (table, row) for every row that a question of this split adds to a table."""
    answers = question.answers
    if split == "finetune":
        yield "finetune", _answer_row(question, answers[index_of_best(answers)])
        yield from (("corpus", _answer_row(question, answer)) for answer in answers)
    elif split == "rl":
        yield "rl", _prompt_columns(question)
    else:
        if split == "evaluation" or pairs:
            yield "evaluation" if split == "evaluation" else "reward_groups", _ranked_row(question)
        name = "evaluation_pairs" if split == "evaluation" else split
        answer_ranks = ranks(answers)
        yield from ((name, build_pair_row(question, pair, sampled_of, answer_ranks)) for pair in pairs)


def build_pair_row(question: Question, pair: Pair, sampled_of: int, answer_ranks: Sequence[int]) -> Fields:
    """Return the row of a comparison, one of ``sampled_of`` that it was drawn from."""
    chosen, rejected = (question.answers[place] for place in pair)
    row = {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    row |= {"gap": chosen.score - rejected.score, "sampled_of": sampled_of}
    row |= {"chosen_older": is_older(chosen, rejected)}
    row |= {"chosen_rank": answer_ranks[pair[0]], "rejected_rank": answer_ranks[pair[1]]}
    return (
        _prompt_columns(question)
        | row
        | _source_columns("chosen", chosen)
        | _source_columns("rejected", rejected)
    )


def _prompt_columns(question: Question) -> Fields:
    messages = to_records(question.messages)
    about = {"question_id": question.id, "prompt": question.prompt, "messages": messages}
    return about | {"site": question.site} | _source_columns("question", question)


def _source_columns(role: str, text: Question | Answer) -> Fields:
    return {
        f"{role}_url": text.url,
        f"{role}_author": text.author,
        f"{role}_author_name": text.author_name,
        f"{role}_licence": text.licence,
    }


def _answer_row(question: Question, answer: Answer) -> Fields:
    return (
        _prompt_columns(question)
        | {"answer": answer.text, "score": answer.score}
        | _source_columns("answer", answer)
    )


def _ranked_row(question: Question) -> Fields:
    """Return a row with all answers by id, so that their order says nothing about quality."""
    answers = question.answers
    sources = [_source_columns("answer", answer) for answer in answers]
    row = {
        "answers": [a.text for a in answers],
        "scores": [a.score for a in answers],
        "ranks": ranks(answers),
        "ages": age_ranks(answers),
    }
    row["best"] = index_of_best(answers)
    columns = {name: [source[name] for source in sources] for name in sources[0]}
    return _prompt_columns(question) | row | columns


def count(statistics: Statistics, question: Question, pairs: Sequence[Pair], sampled_of: int) -> None:
    """Count a question and its pairs, which were drawn from ``sampled_of`` comparisons."""
    statistics.counts["questions"] += 1
    statistics.counts["questions_with_pairs"] += bool(pairs)
    statistics.counts["pairs_to_draw_from"] += sampled_of
    statistics.sites[question.site] += 1
    statistics.licences[question.licence] += 1
    statistics.prompt_bits[len(question.prompt).bit_length()] += 1
    statistics.answers[len(question.answers)] += 1
    for answer in question.answers:
        statistics.licences[answer.licence] += 1
        statistics.scores[answer.score] += 1
        statistics.answer_bits[len(answer.text).bit_length()] += 1
    for pair in pairs:
        _add_pair(statistics, question, pair)
    _add_example(statistics, question, pairs, sampled_of)


def _add_pair(statistics: Statistics, question: Question, pair: Pair) -> None:
    good, bad = (question.answers[place] for place in pair)
    first = is_older(good, bad)
    statistics.counts["pairs"] += 1
    statistics.counts["longer"] += len(good.text) > len(bad.text)
    statistics.counts["dated"] += first is not None
    statistics.counts["older"] += bool(first)
    statistics.gaps[good.score - bad.score] += 1


def _add_example(statistics: Statistics, question: Question, pairs: Sequence[Pair], sampled_of: int) -> None:
    """Keep a pair of the question as an example if its hash is among the smallest."""
    if not pairs:
        return
    draw = int.from_bytes(
        hashlib.blake2b(str(question.id).encode(), digest_size=8, person=b"example").digest()
    )
    if len(statistics.examples) == NUM_EXAMPLES and draw >= statistics.examples[-1][0]:
        return
    pair = pairs[(draw >> 56) % len(pairs)]
    row = build_pair_row(question, pair, sampled_of, ranks(question.answers))
    statistics.examples = sorted([*statistics.examples, (draw, row)], key=lambda one: one[0])[:NUM_EXAMPLES]
