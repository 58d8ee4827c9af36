"""The small inputs of shared/cases: files in the shape of public ones that alignflow once read wrongly."""

from collections import Counter
from pathlib import Path

import pytest

from tasks.rlhf.markdown import to_markdown
from tasks.rlhf.posts import Post, read_posts
from tasks.rlhf.quarantine import Quarantine
from tasks.rlhf.stack_exchange import author_of

CASES = Path(__file__).parents[2] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the small inputs of shared/cases are not on this machine")


def test_every_folder_of_cases_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [folder.name for folder in sorted(CASES.iterdir()) if folder.is_dir() and f'CASES / "{folder.name}"' not in text] == []


# ---------------------------------------------------------------------------------------------------------------------- dumps


def test_formulas_stay_byte_for_byte() -> None:
    posts, _ = read_dump(CASES / "mathjax" / "Posts.xml")
    texts = [to_markdown(post.body) for post in posts.values() if not post.parent]
    assert len(texts) > 20
    for text in texts:
        assert r"$\{x : x \le n\}$ when $A=\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}$ for" in text


def read_dump(path: Path) -> tuple[dict[int, Post], Counter[str]]:
    """The posts of a dump by id, and how many rows cannot be read for which reason."""
    bad = Quarantine()
    posts = {post.id: post for post in read_posts(path, Counter(), bad)}
    return posts, bad.reasons


def test_of_a_join_by_data_explorer_the_posts_columns_are_read() -> None:
    posts, reasons = read_dump(CASES / "sede-join" / "QueryResults.csv")
    assert reasons == {}
    assert min(posts) == 1000
    assert {post.created for post in posts.values()} == {"2015-10-01 21:06:37"}
    for post in posts.values():  # question, then the three answers to it
        assert post.parent == (post.id - post.id % 4 if post.id % 4 else 0)


def test_a_forbidden_character_costs_only_itself() -> None:
    posts, reasons = read_dump(CASES / "xmlchars" / "Posts.xml")
    assert reasons == {}
    assert sorted(posts) == list(range(1, len(posts) + 1))
    assert posts[2].body.startswith("<p>To clean the kettle, take a dry cloth first")


@pytest.mark.parametrize("name", ["NULL", "NA"])
def test_a_word_for_nothing_is_nothing(name: str) -> None:
    posts, reasons = read_dump(CASES / "csv-null" / f"{name}.csv")
    assert reasons == {}
    assert {(post.parent > 0, post.title == "") for post in posts.values()} == {(False, False), (True, True)}
    assert sum(post.accepted > 0 for post in posts.values()) > 0
    assert {author_of(post, "a.example") for post in posts.values() if not post.author_id} == {""}
    assert not any(name in field for post in posts.values() for field in post if isinstance(field, str))
