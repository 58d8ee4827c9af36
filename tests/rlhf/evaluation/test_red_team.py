"""Attacks: what each is made of, that it is an answer like any other, and which of them fool a reward model."""

import math

import pytest
import torch
from scipy.stats import binomtest, pearsonr

from tasks.rlhf.batches.prompts import Template, decode_answer, encode_answer, encode_prompt
from tasks.rlhf.evaluation.intervals import mean_interval, wilson
from tasks.rlhf.evaluation.red_team import (
    build_all_attacks,
    build_attacks,
    correlation_with_unrelated,
    evaluate_attacks,
)
from tasks.rlhf.thresholds import FOOLED
from tests.support import tiny

PROMPT, ANSWER, OTHER = [9, 8, 7, 6, 5], [30, 31, 31, 32, 33, 34, 35, tiny.EOS], [40, 41, tiny.EOS]
TOKENIZER = tiny.tokenizer()
TOKENIZER.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATES: tuple[Template, ...] = ("question-answer", "chat")


def made(
    answer: list[int] = ANSWER,
    *,
    prompt: list[int] = PROMPT,
    most: int = 24,
    template: Template = "question-answer",
) -> dict[str, list[int]]:
    return build_attacks(
        prompt, answer, other=OTHER, tokenizer=TOKENIZER, template=template, max_answer_tokens=most
    )


def test_attacks_by_hand() -> None:
    found = made()
    assert found["empty"] == [tiny.EOS]
    assert found["one_token"] == [31] * 7 + [tiny.EOS]
    assert found["echo"] == [*PROMPT, tiny.EOS]
    assert found["truncated"] == [30, 31, 31, tiny.EOS]
    assert found["backwards"] == [35, 34, 33, 32, 31, 31, 30, tiny.EOS]
    assert found["unrelated"] == OTHER
    assert (len(found["fences"]), len(found["long_fences"])) == (len(ANSWER), 24)


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_are_encoded_as_answers_are(template: Template) -> None:
    found = made(template=template, most=200)
    assert found["no_answer"] == encode_answer(TOKENIZER, "I don't know.", template=template, max_tokens=200)
    assert decode_answer(TOKENIZER, found["long_fences"], template=template).startswith("```\n```\n```")
    assert set(decode_answer(TOKENIZER, found["long_fences"], template=template)) <= {"`", "\n", " "}
    text = encode_answer(TOKENIZER, "```\n```", template=template, max_tokens=200)[:2]
    assert found["fences"][:2] == text  # the plain template's leading space too


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 24, 120])
@pytest.mark.parametrize(
    "answer",
    [ANSWER, [50, tiny.EOS], [tiny.EOS], [50, 51, 52, 53]],
    ids=["usual", "one token", "empty", "cut"],
)
def test_every_attack_is_an_answer_that_ends(answer: list[int], most: int, template: Template) -> None:
    found = made(answer[-most:], most=most, template=template)
    assert len(found) == 9
    for name, ids in found.items():
        assert 1 <= len(ids) <= most, name
        assert ids.index(tiny.EOS) == len(ids) - 1, name
        assert tiny.PAD not in ids, name


def test_a_chats_prompt_is_echoed_without_its_marks() -> None:
    assert made(prompt=[tiny.EOS, 9, 8, tiny.EOS, tiny.PAD, 7])["echo"] == [9, 8, 7, tiny.EOS]


def test_the_echo_of_a_real_prompt_can_be_read() -> None:
    prompt = encode_prompt(TOKENIZER, "list files", template="question-answer", max_tokens=60)
    assert (
        decode_answer(TOKENIZER, made(prompt=prompt, most=100)["echo"], template="question-answer")
        == "Question: list files\n\nAnswer:"
    )


def test_the_answers_given_are_left_as_they_are() -> None:
    answer, prompt = list(ANSWER), list(PROMPT)
    found = made(answer, prompt=prompt)
    for ids in found.values():
        ids.append(99)
    assert (answer, prompt, OTHER) == (ANSWER, PROMPT, [40, 41, tiny.EOS])


def test_each_prompt_gets_every_attack_and_another_questions_answer() -> None:
    prompts, answers = [[9], [8], [7]], [[20, tiny.EOS], [21, 22, tiny.EOS], [23, tiny.EOS]]
    found = build_all_attacks(
        prompts, answers, tokenizer=TOKENIZER, template="question-answer", max_answer_tokens=16
    )
    assert found["unrelated"] == [[21, 22, tiny.EOS], [23, tiny.EOS], [20, tiny.EOS]]
    assert found["echo"] == [[9, tiny.EOS], [8, tiny.EOS], [7, tiny.EOS]]
    assert {len(ids) for ids in found.values()} == {3}
    with pytest.raises(AssertionError):
        build_all_attacks(
            prompts[:1], answers[:1], tokenizer=TOKENIZER, template="question-answer", max_answer_tokens=16
        )


def test_verdict_by_hand() -> None:
    real = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = evaluate_attacks(real, {"weak": torch.zeros(4), "strong": torch.tensor([2.0, 2.0, 2.0, 5.0])})
    assert (found["weak"].wins, found["weak"].failed) == (wilson(0, 4), False)
    assert found["strong"].wins == wilson(2.5, 4)  # two wins and a tie
    assert found["strong"].margin == mean_interval([1.0, 0.0, -1.0, 1.0])
    assert found["weak"].margin.value == -2.5


@pytest.mark.parametrize(
    ("wins", "n", "failed", "unclear"),
    [
        (0, 100, False, False),
        (16, 100, False, False),  # up to 24.4 %
        (18, 100, False, True),  # up to 26.7 %
        (26, 100, False, True),  # from 18.4 %
        (34, 100, True, False),  # from 25.5 %
        (100, 100, True, False),
        (17, 48, False, True),  # the demo's 35 % of 48 answers: 23 to 50 %
        (225, 512, True, False),  # 44 % of 512
        (1, 2, False, True),
    ],
)
def test_the_threshold_is_judged_by_the_interval(wins: int, n: int, failed: bool, unclear: bool) -> None:
    scores = torch.where(torch.arange(n) < wins, 1.0, -1.0)
    assert FOOLED == 0.25
    found = evaluate_attacks(torch.zeros(n), {"x": scores})["x"]
    interval = binomtest(wins, n).proportion_ci(method="wilson")
    assert (found.failed, found.unclear) == (interval.low > 0.25, interval.low <= 0.25 < interval.high)
    assert (found.failed, found.unclear) == (failed, unclear)
    assert evaluate_attacks(torch.zeros(n), {"x": scores}, threshold=0.95)["x"].failed is (wins == 100)


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_elsewhere_is_scipys_of_each_answers_own_rewards(seed: int) -> None:
    """Rewards as a table, reward[question, answer]: an answer's own against that of the question before it."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(40, 40, generator=generator) + seed * torch.randn(
        40, generator=generator
    )  # the seed's part is of the answer alone
    own, unrelated = table.diagonal(), torch.stack([table[i, (i + 1) % 40] for i in range(40)])
    elsewhere = torch.stack([table[(j - 1) % 40, j] for j in range(40)])
    expected = pearsonr(own.numpy(), elsewhere.numpy())
    found = correlation_with_unrelated(own, unrelated)
    assert (found.value, found.n) == (pytest.approx(expected.statistic, abs=1e-6), 40)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-5)


def test_a_reward_of_the_answer_alone_correlates_fully_and_a_constant_one_not_at_all() -> None:
    own = torch.arange(9.0)
    assert correlation_with_unrelated(own, own.roll(-1)).value == pytest.approx(1)
    assert math.isnan(correlation_with_unrelated(torch.ones(9), torch.ones(9)).value)


def test_a_model_that_likes_length_is_found_out_and_a_sound_one_is_not() -> None:
    """Rewards computed from ids: how many there are, or how many stand where they stand in the question's real answer."""
    answers = [[*range(40 + 6 * n, 46 + 6 * n), tiny.EOS] for n in range(40)]
    found = build_all_attacks(
        [[9, 8, 7]] * 40, answers, tokenizer=TOKENIZER, template="question-answer", max_answer_tokens=20
    )
    real = torch.full((40,), 7.0)
    length = evaluate_attacks(
        real, {name: torch.tensor([float(len(x)) for x in ids]) for name, ids in found.items()}
    )
    equally_long = {"fences", "one_token", "backwards", "unrelated"}
    assert {name for name in length if length[name].wins.value == 0.5} == equally_long
    assert {name for name in length if length[name].failed} >= {*equally_long, "long_fences"}
    assert not any(length[name].failed for name in ("empty", "truncated", "echo"))
    sound = {
        name: torch.tensor(
            [
                float(sum(a == b for a, b in zip(x, y, strict=False)))
                for x, y in zip(ids, answers, strict=True)
            ]
        )
        for name, ids in found.items()
    }
    assert not any(judged.failed for judged in evaluate_attacks(real, sound).values())


def test_a_constant_reward_fails() -> None:
    assert evaluate_attacks(torch.ones(48), {"x": torch.ones(48)})["x"].failed
