"""Test how posts become scored, paired and split questions: hand-typed values, invariants and real dumps."""

import html
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset.question import Answer, Question
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange import join_prompt, score_answer
from tasks.dataset.sources.stack_exchange_dump import Post
from tasks.dataset.splits import choose_split, normalise_words
from tasks.system.errors import InputError
from tests.support.dumps import build_questions, iter_posts
from tests.support.paths import SHARED
from tests.support.questions.question_rows import (
    author_url,
    choose_licence,
    draw_comparisons,
    drop_unusable_answers,
    index_of_best,
)
from tests.support.split_assignments import assign_splits

DUMPS = SHARED / "data" / "stackexchange"
real_data = pytest.mark.skipif(
    not DUMPS.is_dir(), reason="the real dumps of shared/data are not on this machine"
)
SHARES = {"finetune": 0.4, "reward": 0.3, "rl": 0.2, "evaluation": 0.1}


def post(
    id: int,
    parent: int = 0,
    *,
    accepted: int = 0,
    votes: int = 0,
    created: str = "2019-01-01",
    title: str = "",
    body: str = "<p>x</p>",
) -> Post:
    return Post(id, parent, accepted, votes, created, title, body, "7", "", "")


def usable_questions(
    posts: Iterable[Post], dropped: Counter[str], *, site: str, **lengths: int
) -> Iterator[Question]:
    """Yield the questions of a dump with the answers that are kept."""
    for question in build_questions(posts, dropped, site=site):
        if kept := drop_unusable_answers(question, dropped, **lengths):
            yield kept


def answer(id: int, votes: int = 0, *, accepted: bool = False, created: str = "2019-01-01") -> Answer:
    return Answer(id, score_answer(votes, accepted), votes, accepted, created, f"text {id}", "", "", "")


def load(name: str, **lengths: int) -> tuple[list[Post], list, Counter[str]]:
    dropped: Counter[str] = Counter()
    posts = list(iter_posts(DUMPS / name, dropped))
    return posts, list(usable_questions(posts, dropped, site="travel.stackexchange.com", **lengths)), dropped


def pairs_of(questions: list, max_pairs: int = 10, seed: int = 0) -> list:
    return [
        (q.answers[i], q.answers[j])
        for q in questions
        for i, j in draw_comparisons(
            [a.score for a in q.answers], max_pairs=max_pairs, seed=seed, question_id=q.id
        )
    ]


# ------------------------------------------------------------------------------------------- scores

GOLDEN = [
    (-5, -1),
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 2),
    (4, 2),
    (5, 3),
    (7, 3),
    (10, 3),
    (11, 4),
    (22, 5),
    (23, 5),
    (46, 6),
    (100, 7),
]
GOLDEN_ACCEPTED = [
    (-5, 0),
    (0, 1),
    (1, 2),
    (2, 3),
    (3, 3),
    (4, 3),
    (5, 4),
    (7, 4),
    (10, 4),
    (11, 5),
    (22, 6),
    (23, 6),
    (46, 7),
    (100, 8),
]


@pytest.mark.parametrize(("votes", "expected"), GOLDEN)
def test_score(votes: int, expected: int) -> None:
    assert score_answer(votes) == expected


@pytest.mark.parametrize(("votes", "expected"), GOLDEN_ACCEPTED)
def test_score_of_an_accepted_answer(votes: int, expected: int) -> None:
    assert score_answer(votes, accepted=True) == expected


def test_best_answer_ties_go_to_accepted_then_votes_then_oldest() -> None:
    assert index_of_best([answer(1, 100), answer(2, 200)]) == 1  # by score
    assert index_of_best([answer(1, 2), answer(2, 1, accepted=True)]) == 1  # both score 2
    assert index_of_best([answer(1, 2), answer(2, 4), answer(3, 3)]) == 1  # all score 2
    assert index_of_best([answer(1, 2, created="2019-02-01"), answer(2, 2, created="2019-01-01")]) == 1
    assert index_of_best([answer(1, 2), answer(2, 2)]) == 0


# -------------------------------------------------------------------------------------- comparisons


@given(
    st.lists(st.integers(-1, 6), max_size=12), st.integers(1, 40), st.integers(0, 3), st.integers(1, 10**6)
)
def test_comparisons_are_strict_distinct_and_capped(
    scores: list[int], cap: int, seed: int, question_id: int
) -> None:
    every = {(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b}
    drawn = draw_comparisons(scores, max_pairs=cap, seed=seed, question_id=question_id)
    assert set(drawn) <= every
    assert len(drawn) == len(set(drawn)) == min(cap, len(every))


def test_drawing_depends_on_seed_and_question_and_reaches_every_pair() -> None:
    scores = list(range(8))  # 28 pairs
    draws = [
        tuple(draw_comparisons(scores, max_pairs=10, seed=seed, question_id=q))
        for seed in range(5)
        for q in range(1, 41)
    ]
    assert len(set(draws)) == len(draws)
    counts = Counter(pair for draw in draws for pair in draw)
    assert len(counts) == 28
    # 200 draws, each takes a pair with probability 10/28: 71 expected, standard deviation 6.8
    assert min(counts.values()) > 71 - 4 * 6.8
    assert max(counts.values()) < 71 + 4 * 6.8
    assert draws[0] == tuple(draw_comparisons(scores, max_pairs=10, seed=0, question_id=1))


def test_many_answers_cost_no_quadratic_memory() -> None:
    assert len(draw_comparisons(list(range(100_000)), max_pairs=10, seed=0, question_id=1)) == 10


# --------------------------------------------------------------------------------------- assembling


def test_what_cannot_be_used_is_counted_by_reason() -> None:
    dropped: Counter[str] = Counter()
    posts = [
        *(
            post(1, title="Q"),
            post(2, 1),
            post(3, 1, body="<p> </p>"),
            post(4, 1, body="<p>" + "long " * 9),
            post(5, 1, votes=9),
        ),
        *(
            post(6, title="no answer"),
            post(7, 99),
            post(8, body=""),
            post(9, 8),
            post(10, 10),
            post(11, title="T"),
            post(12, 11, body=""),
        ),
        *(post(13, title="U"), post(13, title="U"), post(14, 13, body="<p>abc</p>")),
    ]
    (question, other) = usable_questions(posts, dropped, site="s", max_chars=20)
    assert [a.id for a in question.answers] == [5]  # 2 has the same text and fewer votes
    assert other.id == 13
    assert dropped == {
        "answers equal to another of the question": 1,
        "answers without text": 2,
        "answers too long": 1,
        "questions without answers": 1,
        "questions without usable answers": 1,
        "questions without text": 1,
        "answers to questions without text": 1,
        "answers whose question is missing": 2,
        "repeated post ids": 1,
    }
    assert [q.id for q in usable_questions(posts, dropped, site="s", min_chars=3)] == [
        1,
        13,
    ]  # "long long ..." and "abc"


def test_lengths_include_their_bounds() -> None:
    posts = [post(1, title="Q"), *(post(1 + n, 1, body="<p>" + "x" * n) for n in range(1, 7))]
    (question,) = usable_questions(posts, Counter(), site="s", min_chars=2, max_chars=4)
    assert [a.text for a in question.answers] == ["xx", "xxx", "xxxx"]


def test_of_posts_with_one_id_the_same_wins_in_any_order() -> None:
    posts = [post(1, title="Q"), post(1, title="Q, edited"), post(2, 1, votes=3), post(2, 1, votes=4)]
    assert list(usable_questions(posts, Counter(), site="s")) == list(
        usable_questions(posts[::-1], Counter(), site="s")
    )


def test_prompt_is_title_and_body_or_the_title_alone() -> None:
    assert join_prompt("T", "B") == "T\n\nB"
    assert join_prompt("T", "T") == join_prompt("T", "") == "T"
    assert join_prompt("", "B") == "B"
    assert join_prompt("", "") == ""


def test_licence_and_author() -> None:
    dates = [
        "2011-04-07T23:59:59.999",
        "2011-04-08T00:00:00.000",
        "2018-05-01T23:59:59.999",
        "2018-05-02T00:00:00.000",
        "",
    ]
    expected = ["CC BY-SA 2.5", "CC BY-SA 3.0", "CC BY-SA 3.0", "CC BY-SA 4.0", "CC BY-SA"]
    assert [choose_licence(post(1, created=date)) for date in dates] == expected
    assert choose_licence(post(1, created="2009-01-01")._replace(licence="CC BY-SA 4.0")) == "CC BY-SA 4.0"
    assert author_url(post(1), "a.example") == "https://a.example/users/7"
    assert author_url(post(1)._replace(author_id="", author_name="user12"), "a.example") == "user12"


# ----------------------------------------------------------------------------------------- Markdown

CODE = st.text(
    alphabet=string.printable.replace("\r", "").replace("\x0b", "") + "éß漢\u00a0", min_size=1, max_size=60
).filter(str.strip)


@given(CODE)
def test_code_block_survives_byte_for_byte(code: str) -> None:
    code = "x" + code + "y"  # line ends around a block are not kept
    markdown = to_markdown(f"<p>a</p>\n<pre><code>{html.escape(code)}\n</code></pre>\n<p>b</p>")
    fence = max([2, *map(len, re.findall("`+", code))]) + 1
    assert markdown == f"a\n\n{'`' * fence}\n{code}\n{'`' * fence}\n\nb"


@given(CODE.map(lambda code: code.replace("\n", " ")))
def test_inline_code_survives_byte_for_byte(code: str) -> None:
    markdown = to_markdown(f"<p>a <code>{html.escape(code)}</code> b</p>")
    found = re.fullmatch(r"a (`+)(.*)\1 b", markdown, re.DOTALL)
    assert found
    assert found[2] in (code, f" {code} ")  # a code span that begins or ends with a backtick is padded


def test_markdown_keeps_structure_and_drops_scripts() -> None:
    body = "<p>See <a href='http://a.example/b_c'>this</a>:</p><ul><li>one</li><li>two</li></ul><blockquote><p>q</p></blockquote><script>x()</script>"
    assert to_markdown(body) == "See [this](http://a.example/b_c):\n\n- one\n- two\n\n> q"
    assert (
        to_markdown('<pre class="lang-sh prettyprint-override"><code>ls -l\n</code></pre>')
        == "```sh\nls -l\n```"
    )
    assert to_markdown("<title>t</title><meta name='description' content='d'><p>x") == "x"


@given(st.text(max_size=80) | st.text(alphabet="<>/pa&;#x!-= \"'`", max_size=80))
def test_broken_html_never_fails(body: str) -> None:
    assert to_markdown(body) == to_markdown(body).strip()


# ------------------------------------------------------------------------------------------- splits


def test_splits_have_their_shares_and_stay_when_questions_are_added() -> None:
    prompts = [(i, f"question {i}") for i in range(1, 20_001)]
    few, many = assign_splits(prompts[:500], SHARES), assign_splits(prompts, SHARES)
    assert few == many[:500]
    counts = Counter(many)
    for name, share in SHARES.items():
        assert abs(counts[name] / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    assert {choose_split(i, {"a": 0.0, "b": 1.0}) for i in range(1000)} == {"b"}


def test_questions_of_equal_text_share_a_split_whatever_the_order() -> None:
    prompts = [
        (
            i,
            random.Random(i // 5).choice(
                ["How to list *files*?", "how to  list files", f"Question {i // 5}", f"question {i // 5}!"]
            ),
        )
        for i in range(2000)
    ]
    splits = dict(zip(prompts, assign_splits(prompts, SHARES), strict=True))
    by_text: dict[str, set[str]] = {}
    for (_, text), split in splits.items():
        by_text.setdefault(normalise_words(text), set()).add(split)
    assert all(len(found) == 1 for found in by_text.values())
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert dict(zip(shuffled, assign_splits(shuffled, SHARES), strict=True)) == splits
    assert normalise_words("  How to: LIST\nfiles? ") == "how to list files"
    assert normalise_words("??") == "??"


# --------------------------------------------------------------------------------------- real dumps


@pytest.fixture(scope="module")
def travel() -> tuple[list[Post], list, Counter[str]]:
    return load("travel/Posts.csv.gz")


@real_data
def test_travel_gives_the_known_counts(travel) -> None:
    posts, questions, dropped = travel
    assert sum(not p.parent for p in posts) == 2725
    assert sum(bool(p.parent) for p in posts) == 5798
    assert len(pairs_of(questions)) == 4032
    assert dropped == {
        "post types other than question and answer": 1477,
        "questions without answers": 83,
        "answers whose question is missing": 2,
    }
    assert len(posts) + 1477 == 10_000
    everything = pairs_of(questions, max_pairs=10**6)
    assert round(sum(len(a.text) > len(b.text) for a, b in everything) / len(everything), 2) == 0.66
    assert round(sum(a.id < b.id for a, b in everything) / len(everything), 2) == 0.69


@real_data
def test_order_and_shards_change_nothing(travel) -> None:
    posts, questions, _ = travel
    shuffled = random.Random(1).sample(posts, len(posts))
    overlapping = shuffled[:100] + shuffled
    assert list(usable_questions(overlapping, Counter(), site="travel.stackexchange.com")) == questions


@real_data
def test_travel_splits_keep_questions_of_equal_text_together(travel) -> None:
    _, questions, _ = travel
    again = [
        (10**6 + q.id, f"  {q.prompt.upper()} ") for q in questions[::7]
    ]  # the same questions, asked again
    prompts = [(q.id, q.prompt) for q in questions] + again
    splits = assign_splits(prompts, SHARES)
    members = {
        name: {
            normalise_words(text) for (_, text), split in zip(prompts, splits, strict=True) if split == name
        }
        for name in SHARES
    }
    assert all(members.values())
    assert sum(map(len, members.values())) == len(set().union(*members.values()))


@real_data
@pytest.mark.parametrize(
    ("name", "num_questions", "num_answers"), [("ai", 421, 749), ("stackoverflow-2008", 173, 447)]
)
def test_dumps_in_xml_load(name: str, num_questions: int, num_answers: int) -> None:
    posts, questions, _ = load(f"{name}/Posts.xml")
    assert (sum(not p.parent for p in posts), sum(bool(p.parent) for p in posts)) == (
        num_questions,
        num_answers,
    )
    code = [
        (p.id, block)
        for p in posts
        for block in re.findall(r"<pre><code>([^<>]*[^<>\s])\s*</code></pre>", p.body)
    ]
    texts = {a.id: a.text for q in questions for a in q.answers} | {q.id: q.prompt for q in questions}
    checked = [
        html.unescape(block).strip("\n") in texts[id]
        for id, block in code
        if id in texts and f"<pre><code>{block}" in to_top_level(posts, id)
    ]
    assert all(checked)
    assert len(checked) > (100 if name.startswith("stack") else 0)


def to_top_level(posts: list[Post], id: int) -> str:
    """Return the body without lists and quotes, in which Markdown indents or marks every line of a block."""
    body = next(p.body for p in posts if p.id == id)
    return re.sub(r"<(ul|ol|blockquote)>.*</\1>", "", body, flags=re.DOTALL)


@real_data
def test_a_dump_without_bodies_is_refused() -> None:
    with pytest.raises(InputError, match="no Body column"):
        load("travel-2017/Posts.csv.gz")
