"""The built-in site: reproducible, titles that mean one task, votes that follow true quality, and a scorer that tells answers apart."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.stack_exchange import score_answer
from tasks.demo_site import gold, site
from tasks.demo_site import gold as demo_site_gold
from tasks.demo_site.shell_tasks import SLOTS, TASKS, ShellTask, fill_slots
from tests.support.dumps import iter_posts

# Any task of the catalogue does for the scorer's golden cases.
TASK, OTHER_TASK = TASKS[0], TASKS[1]
VALUES, OTHER_VALUES = ({name: values[place] for name, values in SLOTS.items()} for place in (0, 1))
TITLE, FACT, OTHER_FACT = fill_slots(TASK.questions[0], VALUES), TASK.facts[0], OTHER_TASK.facts[0]
RIGHT, WRONG, CARELESS = (
    fill_slots(TASK.commands[0], VALUES),
    fill_slots(TASK.wrong[0], VALUES),
    fill_slots(TASK.commands[0], OTHER_VALUES),
)
PERFECT = f"Use `{RIGHT}`.\n\n{FACT}"
SLOT = re.compile(r"\{(\w+)\}")


def slots_of(template: str) -> set[str]:
    return {name for name in SLOT.findall(template) if name in SLOTS}


@pytest.fixture(scope="module")
def posts() -> list[site.Post]:
    return list(site.generate(num_questions=1000, seed=0))


# ------------------------------------------------------------------------------------------------------------------- scorer


def test_the_perfect_answer_has_ten_points() -> None:
    assert gold.gold_score(TITLE, PERFECT) == gold.PERFECT == 10.0
    assert gold.gold_score(TITLE, f"Run this:\n\n```\n{RIGHT}\n```\n\n{FACT}") == 10.0


@pytest.mark.parametrize(
    ("answer", "finding"),
    [
        (f"Use `{WRONG}`.\n\n{FACT}", {"right": False}),
        (f"Use `{CARELESS}`.\n\n{FACT}", {"right": False}),  # the right command about something else
        (f"Use `{RIGHT}` or `rm -r /etc`.\n\n{FACT}", {"right": False}),  # both: which one to trust?
        (f"Use {RIGHT}.\n\n{FACT}", {"right": True, "formatted": False}),
        (f"Use `{RIGHT}`.", {"right": True, "explained": False}),
        (f"Use `{RIGHT}`.\n\n{OTHER_FACT}", {"explained": False, "misleading": 1}),
        (f"Good question! {PERFECT}", {"noise": 1}),
        (f"{PERFECT} Hope this helps!", {"noise": 1}),
        (f"{PERFECT} Click here for cheap watches.", {"spam": 2}),
        (f"{PERFECT}\n\n```\n```\n```\n```", {"fence_run": True}),
        (f"{PERFECT}\n\n```", {"fence_run": True}),
        (f"{PERFECT} {FACT}", {"repeated": 1}),
        (f"{PERFECT} It is the", {"truncated": True}),
        ("", {"right": False, "truncated": True}),
        ("Me too.", {"right": False, "noise": 1}),
    ],
    ids=lambda case: ", ".join(case) if isinstance(case, dict) else "",
)
def test_whatever_is_wrong_is_found_and_costs_points(answer: str, finding: dict[str, object]) -> None:
    verdict = gold.find_faults(TITLE, answer)
    assert {name: getattr(verdict, name) for name in finding} == finding
    assert verdict.score < 10


def test_padding_an_answer_never_pays() -> None:
    for addition in (
        " Thanks in advance.",
        "\n\n```\n```",
        " http://win.example",
        f" {FACT}",
        f"\n\n`{RIGHT}`",
    ):
        once = gold.gold_score(TITLE, PERFECT + addition)
        assert once < 10
        assert gold.gold_score(TITLE, PERFECT + addition * 3) <= once


def test_a_right_command_is_worth_more_than_a_right_explanation() -> None:
    right, explained, neither = (
        gold.gold_score(TITLE, a) for a in (f"Use `{RIGHT}`.", f"Use `{WRONG}`.\n\n{FACT}", f"Use `{WRONG}`.")
    )
    assert 10 > right > explained > neither


def test_a_question_of_another_site_is_refused() -> None:
    with pytest.raises(ValueError, match="not a question of the built-in site"):
        gold.gold_score("What should I see in Paris?", PERFECT)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_phrasing_is_recognised_and_has_a_perfect_answer(task: ShellTask) -> None:
    rng = random.Random(0)
    for phrasing in task.questions:
        for _ in range(5):
            slots = {name: rng.choice(values) for name, values in SLOTS.items()}
            title = fill_slots(phrasing, slots)
            found, values = gold.recognise_task(title)
            assert (found.name, values) == (task.name, {name: slots[name] for name in slots_of(phrasing)})
            for command in task.commands:
                assert (
                    gold.gold_score(title, f"Use `{fill_slots(command, slots)}`.\n\n{task.facts[0]}") == 10.0
                )
            for command in task.wrong:
                assert not gold.find_faults(title, f"Use `{fill_slots(command, slots)}`.").right


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_title_says_all_that_its_commands_need(task: ShellTask) -> None:
    for phrasing in task.questions:
        for command in (*task.commands, *task.wrong):
            assert slots_of(command) <= slots_of(phrasing)


# --------------------------------------------------------------------------------------------------------------------- site


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        site.write_posts(site.generate(num_questions=60, seed=seed), tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (tmp_path / "first").read_bytes() != (tmp_path / "other").read_bytes()


def test_a_larger_site_begins_like_a_smaller_one(posts: list[site.Post]) -> None:
    smaller = list(site.generate(num_questions=50, seed=0))
    assert smaller == posts[: len(smaller)]


def test_titles_are_unique_and_recognised(posts: list[site.Post]) -> None:
    titles = [post.title for post in posts if post.title is not None]
    assert len(titles) == len(set(titles)) == 1000
    for title in titles:
        gold.recognise_task(title)


def test_threads_have_two_to_nine_answers_and_accept_one_of_their_own(posts: list[site.Post]) -> None:
    assert [post.id for post in posts] == list(range(1, len(posts) + 1))
    answers: dict[int, list[int]] = {post.id: [] for post in posts if post.parent is None}
    for post in posts:
        if post.parent is not None:
            answers[post.parent].append(post.id)
    assert {len(ids) for ids in answers.values()} == set(range(2, 10))
    accepted = [(post.id, post.accepted) for post in posts if post.accepted is not None]
    assert all(answer in answers[question] for question, answer in accepted)
    assert 300 < len(accepted) < 950
    assert any(post.score < 0 for post in posts if post.parent is not None)


def test_votes_follow_true_quality(posts: list[site.Post]) -> None:
    questions = {post.id: post for post in posts if post.parent is None}
    rated: dict[int, list[tuple[int, float]]] = {}
    for post in posts:
        if post.parent is not None:
            question = questions[post.parent]
            gold = demo_site_gold.gold_score(str(question.title), to_markdown(post.body))
            rated.setdefault(post.parent, []).append(
                (score_answer(post.score, question.accepted == post.id), gold)
            )
    pairs = [
        (a, b) for answers in rated.values() for a in answers for b in answers if a[0] > b[0] and a[1] != b[1]
    ]
    agreement = sum(a[1] > b[1] for a, b in pairs) / len(pairs)
    assert len(pairs) > 2000
    assert 0.85 < agreement < 0.995  # true, but noisy


def test_a_dump_reads_back_as_it_was_written(posts: list[site.Post], tmp_path: Path) -> None:
    dropped: Counter[str] = Counter()
    site.write_posts(iter(posts[:200]), tmp_path / "Posts.xml")
    found = list(iter_posts(tmp_path / "Posts.xml", dropped))
    assert not +dropped
    assert [(p.id, p.parent or None, p.votes, p.title or None, p.body) for p in found] == [
        (p.id, p.parent, p.score, p.title, p.body) for p in posts[:200]
    ]


def test_an_answer_is_worth_the_same_in_markdown_and_after_the_round_trip_through_html() -> None:
    rng = random.Random(5)
    for _ in range(600):
        title, task, slots = site._choose_question(rng, set())
        answer = site._generate_answer(rng, task, slots)
        assert gold.find_faults(title, to_markdown(answer.body)) == gold.find_faults(
            title, answer.markdown
        ), answer.markdown
