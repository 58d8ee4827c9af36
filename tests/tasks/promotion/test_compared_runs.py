"""Test which runs, policies and judge a comparison means, and what differs between runs."""

from typing import Any

import pytest

from tasks.promotion.compared_runs import Chosen, describe_runs, find_compared, list_differences, prepare
from tasks.promotion.comparing_judge import add_judge, choose_judge
from tasks.promotion.finished_runs import FinishedRun, find_unique_run
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import make_run


def finished(
    name: str,
    *,
    reward: str = "r",
    policies: tuple[str, ...] = ("sft", "ppo"),
    at: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> FinishedRun:
    digests = {"data": "d", "merge": "m", "reward": reward, "answers": name}
    stages = [
        {"name": one, "key": f"{one} {name}", "digest": digest, "warnings": [], "metrics": {}}
        for one, digest in digests.items()
    ]
    metrics: dict[str, Any] = {f"{policy}.length": 1.0 for policy in policies}
    summary = {"stages": stages, "metrics": metrics, "finished": at, "profile": "demo"}
    given = {
        "seed": 0,
        "source": {"kind": "shell-site"},
        "judge": {"kind": "none"},
        "machine": {"threads": 1},
    }
    return FinishedRun(name, {"mlflow.runName": name}, summary, given | (settings or {}))


OWN = {"source": {"kind": "own", "path": "a.jsonl"}}
LOCAL = {"judge": {"kind": "local", "path": "model"}}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {one.run_id: one for one in (finished("old", at=1.0), finished("demo 04:25 a", at=2.0))}
    runs["bare"] = finished("bare", policies=())
    monkeypatch.setattr("tasks.promotion.compared_runs.find_unique_run", lambda _, name: runs[name])


def test_a_run_is_found_by_id_prefix_name_or_as_the_latest(tracker: Tracker) -> None:
    first, second = make_run(tracker, 1), make_run(tracker, 2)
    length = next(n for n in range(1, 33) if first.run_id[:n] != second.run_id[:n])
    for text in (first.run_id, first.run_id[:length], first.name, "flow-1"):
        assert find_unique_run(tracker, text).run_id == first.run_id
    assert find_unique_run(tracker, "latest").run_id == second.run_id
    with pytest.raises(InputError, match="There is no run nothing"):
        find_unique_run(tracker, "nothing")


def test_an_ambiguous_name_or_prefix_is_refused_with_the_ids(tracker: Tracker) -> None:
    made = [make_run(tracker, seed) for seed in range(17)]  # two of them begin with the same character
    first = [run.run_id[0] for run in made]
    shared = next(letter for letter in first if first.count(letter) > 1)
    with pytest.raises(
        InputError, match=f"{first.count(shared)} runs are called {shared} or have an id"
    ) as error:
        find_unique_run(tracker, shared)
    assert next(run.run_id[:12] for run in made if run.run_id[0] == shared) in str(error.value)


def test_a_run_without_answers_is_refused(tracker: Tracker) -> None:
    run = make_run(tracker, 1)  # whose summary has no length of an answer
    with pytest.raises(InputError, match=f"The run {run.run_id} has no answers to compare"):
        find_compared(tracker, [run.run_id, run.run_id])


@pytest.mark.usefixtures("known")
def test_runs_are_in_the_order_of_their_ends_whichever_is_named_first(tracker: Tracker) -> None:
    for names in (["old", "demo 04:25 a:ppo"], ["demo 04:25 a:ppo", "old"]):
        found = find_compared(tracker, names)
        assert [(one.run.run_id, one.policies) for one in found] == [
            ("old", ("sft", "ppo")),
            ("demo 04:25 a", ("ppo",)),
        ]


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["old"], "Name 2 to 26 runs to compare, not 1"),
        (["old", "demo 04:25 a:ppo,dpo"], "The run demo 04:25 a has no dpo; it has sft, ppo"),
        (["old", "bare"], "The run bare has no answers to compare"),
    ],
)
def test_what_cannot_be_compared_is_said(tracker: Tracker, names: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        find_compared(tracker, names)


def test_only_what_differs_and_matters_is_listed() -> None:
    one = finished("a", settings={"ppo": {"kl_coefficient": 0.1, "steps": 3}})
    other = finished("b", settings={"ppo": {"kl_coefficient": 0.2, "steps": 3}, "machine": {"threads": 8}})
    assert list_differences([one, other]) == [{"ppo.kl_coefficient": "0.1"}, {"ppo.kl_coefficient": "0.2"}]
    other.summary["stages"][0]["digest"] = "another"
    assert list_differences([one, other])[1]["digest of the data"] == "another"


@pytest.mark.parametrize(
    ("runs", "text", "expected"),
    [
        ([finished("a"), finished("b")], "auto", ("a", "gold")),
        ([finished("a"), finished("b", settings=OWN)], "auto", ("a", "reward")),
        ([finished("a", settings=OWN), finished("b", settings=OWN | LOCAL)], "auto", ("b", "lm")),
        ([finished("a"), finished("b")], "reward", ("a", "reward")),
        (
            [
                finished("a", settings=OWN | {"reward": {"held_out_member": True}}),
                finished("b", settings=OWN),
            ],
            "auto",
            ("a", "held_out"),
        ),
    ],
)
def test_the_judge(tracker: Tracker, runs: list[FinishedRun], text: str, expected: tuple[str, str]) -> None:
    found = choose_judge(tracker, runs, text)
    assert (found.owner.run_id, found.kind) == expected


@pytest.mark.parametrize(
    ("runs", "text", "sentence"),
    [
        ([finished("a"), finished("b")], "nobody", "'nobody' is no judge"),
        ([finished("a"), finished("b")], "gold:a", "'gold:a' is no judge"),
        ([finished("a"), finished("b")], "lm", "do not have the language model as a judge"),
        ([finished("a"), finished("b", settings=OWN)], "gold", "do not have the gold scorer as a judge"),
        ([finished("a"), finished("b", reward="other")], "reward", "The reward model is another one in each"),
    ],
)
def test_a_judge_that_cannot_decide_is_refused(
    tracker: Tracker, runs: list[FinishedRun], text: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        choose_judge(tracker, runs, text)


def test_a_named_run_lends_its_reward_model_and_settings(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = finished(
        "owner", reward="third", settings={"text": {"max_answer_tokens": 99}, "ppo": {"steps": 3}}
    )
    owner.summary["metrics"]["judge.reward.agreement"] = {"value": 0.7}
    monkeypatch.setattr("tasks.promotion.comparing_judge.find_unique_run", lambda *_: owner)
    runs = [finished("a"), finished("b", reward="other")]
    judge = choose_judge(tracker, runs, "reward:owner")
    compared = describe_runs([Chosen(run, ("ppo",)) for run in runs])
    found = add_judge(compared, judge)
    assert found.judged_by
    assert (found.judged_by.title, found.judged_by.card) == (
        "the reward model of owner",
        {"agreement": {"value": 0.7}},
    )
    assert found.text.max_answer_tokens == 99
    owner.settings["text"] = {"gone": 1}
    with pytest.raises(InputError, match=r"settings are of another version of alignflow \(text.gone"):
        add_judge(compared, judge)


def test_answers_that_are_gone_are_named(tracker: Tracker) -> None:
    chosen = [Chosen(finished(name), ("ppo",)) for name in ("a", "b")]
    with pytest.raises(
        InputError, match="The artifact answers of the run a is neither in this home nor in MLflow"
    ):
        prepare(tracker, chosen, "")
