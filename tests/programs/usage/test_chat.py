"""Test the chat: what is asked, sampled, remembered and shown, on a fake terminal and in a pipe."""

import io
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tasks.config.commands.usage import Sampling
from tasks.programs.usage import chat
from tasks.programs.usage.answer import Answer
from tasks.programs.usage.chat_screens import PlainScreen, Screen, TerminalScreen, arrange, show_text
from tasks.programs.usage.chat_templates import Message, encode_conversation
from tasks.programs.usage.loaded_policies import LoadedPolicy, load_policies
from tasks.system.errors import InputError
from tests.programs.usage.tiny_policies import adapter, policy
from tests.support import tiny

HOSTILE = "\x1b[2J\x1b]0;title\x07<b>x</b> [red]y[/red] **z** \x9b31m\r\u202eabc\n- item\tend"
ESCAPE = "\x1b"
SEEDED = Sampling(seed=0)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedPolicy]:
    """Return the base and two adapters on it, which share its weights."""
    root = tmp_path_factory.mktemp("policies")
    base = tiny.base_folder(root / "base")
    tuned = [adapter(root / name, base, seed=seed) for seed, name in enumerate(("dpo", "ppo"), 1)]
    files = [policy(base), *(policy(base, one) for one in tuned)]
    return load_policies(tuple(files), tiny.CPU)


def reading(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Return a reader of lines, or of keys that raise; the end follows."""
    pending = [*lines, EOFError]

    def read() -> str:
        line = pending.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def converse(
    policies: list[LoadedPolicy],
    *lines: str | type[BaseException],
    screen: Screen | None = None,
    interactive: bool = True,
    history: bool | None = True,
    sampling: Sampling = SEEDED,
) -> tuple[str, chat.Session]:
    """Return what a chat shows as plain lines, and its session at the end."""
    file = io.StringIO()
    session = chat.Session(policies, sampling, history=history)
    shown = screen or PlainScreen(Console(file=file))
    chat.converse(session, shown, reading(*lines), is_interactive=interactive)
    return file.getvalue(), session


def test_policies_of_one_base_share_it_and_answer_as_themselves(policies: list[LoadedPolicy]) -> None:
    greedy = Sampling(temperature=0)
    answers = [Answer(one, [Message(role="user", content="list files")], greedy, seed=0) for one in policies]
    while not all(one.is_complete for one in answers):  # in turns: none may leave its weights to the next
        for answer in answers:
            answer.extend(0)
    assert len({tuple(one.ids) for one in answers}) == 3
    for one, answer in zip(policies, answers, strict=True):
        with one.active() as model, torch.no_grad():
            ids = torch.tensor([answer.prompt + answer.ids])
            likeliest = model(ids).logits[0, len(answer.prompt) - 1 : -1].argmax(dim=1)
        assert answer.ids == likeliest.tolist()
    weights = []
    for one in policies:
        with one.active() as model:
            weights.append(model.get_input_embeddings().weight.data_ptr())
    assert len(set(weights)) == 1


def test_answers_are_sampled_at_the_temperature(policies: list[LoadedPolicy]) -> None:
    """Compare frequencies of the first token with its probabilities."""
    question = [Message(role="user", content="sort lines")]
    one, temperature, draws = policies[1], 0.8, 600
    counts = torch.zeros(tiny.VOCABULARY)
    for seed in range(draws):
        answer = Answer(one, question, Sampling(temperature=temperature, max_tokens=1), seed=seed)
        answer.extend(0)
        counts[answer.ids[0]] += 1
    with one.active() as model, torch.no_grad():
        logits = model(torch.tensor([answer.prompt])).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=0)
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 5 * spread + 1e-3).all()
    narrow = Sampling(temperature=temperature, top_p=0.3, max_tokens=1)
    likeliest, mass = [], 0.0
    for token in expected.argsort(descending=True).tolist():
        if mass < 0.3:
            likeliest.append(token)
        mass += float(expected[token])
    for seed in range(60):
        answer = Answer(one, question, narrow, seed=seed)
        answer.extend(0)
        assert answer.ids[0] in likeliest


def test_each_policy_remembers_its_own_answers(policies: list[LoadedPolicy]) -> None:
    shown, session = converse(policies[1:], "list files", "sort lines")
    assert [len(history) for history in session.histories] == [4, 4]
    first, second = session.histories
    assert [turn["role"] for turn in first] == ["user", "assistant"] * 2
    assert first[1] != second[1]
    assert [line.partition(":")[0] for line in shown.splitlines() if line.startswith(("dpo:", "ppo:"))] == [
        "dpo", "ppo", "dpo", "ppo",
    ]  # fmt: skip
    answer = Answer(policies[1], [*first[:2], Message(role="user", content="x")], Sampling(), seed=0)
    assert answer.prompt == encode_conversation(
        policies[1].tokenizer, [*first[:2], Message(role="user", content="x")]
    )
    assert not any(converse(policies, "list files", history=False)[1].histories)
    assert not any(converse(policies, "list files", history=None)[1].histories)  # question-answer


def test_the_seed_repeats_a_chat(policies: list[LoadedPolicy]) -> None:
    chats = {converse(policies, "list files", "list files", sampling=Sampling(seed=s))[0] for s in (1, 1, 2)}
    assert len(chats) == 2
    first, second = [re.findall("base: (.*)", text) for text in sorted(chats)]
    assert first[0] != first[1]  # the same question again is answered anew
    assert second[0] != second[1]


def test_old_turns_leave_if_the_context_is_full(policies: list[LoadedPolicy]) -> None:
    one = policies[0]
    turn = [Message(role="user", content="list files " * 4), Message(role="assistant", content="sort " * 6)]
    answer = Answer(one, [*turn * 6, Message(role="user", content="sort")], Sampling(), seed=0)
    assert 0 < answer.turns_left_out < 6
    assert len(answer.prompt) + answer.max_tokens <= tiny.CONTEXT
    kept = [*turn * (6 - answer.turns_left_out), Message(role="user", content="sort")]
    assert answer.prompt == encode_conversation(one.tokenizer, kept)
    with pytest.raises(InputError, match=r"the question takes .* of the 128 tokens"):
        Answer(one, [Message(role="user", content="list files " * 90)], Sampling(), seed=0)
    endless = Answer(one, turn[:1], Sampling(max_tokens=100_000), seed=0)
    assert len(endless.prompt) + endless.max_tokens == tiny.CONTEXT


def test_commands(policies: list[LoadedPolicy]) -> None:
    shown, session = converse(
        policies[:1], "/again", "list files", "/again", "/again", "/nonsense", "/etc/passwd"
    )
    assert "There is no question yet." in shown
    assert "There is no command /nonsense." in shown
    questions = [turn["content"] for turn in session.histories[0] if turn["role"] == "user"]
    assert questions == ["list files", "/etc/passwd"]  # asked three times, remembered once
    assert session.num_asked == 4
    shown, session = converse(policies[:1], "list files", "/clear", "/again", "/quit", "sort lines")
    assert shown.count("There is no question yet.") == 1
    assert not session.histories[0]
    assert session.num_asked == 1
    assert (
        converse(policies[:1], "/clear", interactive=False)[1].num_asked == 1
    )  # in a file all are questions


def test_ctrl_c_at_the_prompt_says_how_to_leave(policies: list[LoadedPolicy]) -> None:
    shown, session = converse(policies[:1], KeyboardInterrupt, "list files")
    assert "Ctrl-D ends the chat" in shown
    assert session.num_asked == 1


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    policies: list[LoadedPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    extend = Answer.extend

    def extend_and_press(self: Answer, seconds: float) -> None:
        extend(self, 0)
        if len(self.ids) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Answer, "extend", extend_and_press)
    before = signal.getsignal(signal.SIGINT)
    _, session = converse(policies[:1], "list files", sampling=Sampling(seed=0, temperature=5.0))
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    whole = Answer(policies[0], session.histories[0][:1], Sampling(temperature=5.0), seed=0)
    assert len(session.histories[0]) == 2
    kept = session.histories[0][1]["content"]
    whole.ids = policies[0].tokenizer(f" {kept}")["input_ids"]
    assert len(whole.ids) <= 6  # three tokens of twelve


def test_a_question_that_is_refused_ends_only_a_file(policies: list[LoadedPolicy]) -> None:
    long = "list files " * 90
    shown, session = converse(policies[:1], long, "sort lines")
    assert "ask a shorter one" in shown
    assert session.num_asked == 1
    with pytest.raises(InputError, match="ask a shorter one"):
        converse(policies[:1], long, interactive=False)


def terminal(width: int = 100, height: int = 30) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=None), file


def test_answers_stand_side_by_side_on_a_terminal(policies: list[LoadedPolicy]) -> None:
    console, file = terminal()
    converse(policies[1:], "list files", screen=TerminalScreen(console), interactive=False)
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.getvalue()).splitlines()
    last = [line for line in lines if "─ dpo ─" in line][-1]
    assert "─ ppo ─" in last
    assert len(last.rpartition("\r")[2]) == 100
    assert any("tokens" in line and "/s ─╯╰─" in line for line in lines)
    console, file = terminal(width=50)
    converse(policies[1:], "list files", screen=TerminalScreen(console), interactive=False)
    assert "─ dpo ─" in file.getvalue()
    assert not any("dpo" in line and "ppo" in line for line in file.getvalue().splitlines())


def fixed(one: LoadedPolicy, text: str) -> Answer:
    """Return an answer with this text."""

    class Fixed(Answer):
        @property
        def text(self) -> str:
            return text

    return Fixed(one, [Message(role="user", content="x")], Sampling(), seed=0)


def test_model_text_is_shown_as_text(policies: list[LoadedPolicy]) -> None:
    for text in (
        show_text(HOSTILE),
        _shown(fixed(policies[0], HOSTILE)),
        _printed(fixed(policies[0], HOSTILE)),
    ):
        assert not {ESCAPE, "\r", "\x07", "\x9b", "\u202e"} & {*text}
        assert "<b>x</b> [red]y[/red] **z**" in text
        assert "␛[2J␛]0;title␇" in text


def _shown(answer: Answer) -> str:
    file = io.StringIO()
    Console(file=file, width=90, color_system=None).print(arrange([answer], 90, None))
    return file.getvalue()


def _printed(answer: Answer) -> str:
    file = io.StringIO()
    with PlainScreen(Console(file=file)).answering("", [answer]):
        pass
    return file.getvalue()


def test_while_it_grows_a_long_answer_shows_its_end(policies: list[LoadedPolicy]) -> None:
    answer = fixed(policies[0], "\n".join(f"line {number}" for number in range(60)))
    file = io.StringIO()
    Console(file=file, width=90, color_system=None).print(arrange([answer], 90, 12))
    lines = file.getvalue().splitlines()
    assert len(lines) == 12
    assert "line 59" in lines[-2]
    assert "line 49" not in file.getvalue()


def test_policies_keep_their_order(tmp_path: Path) -> None:
    bases = [tiny.base_folder(tmp_path / kind, kind) for kind in ("llama", "gpt2")]
    tuned = adapter(tmp_path / "tuned", bases[0])
    wanted = (policy(bases[0], tuned), policy(bases[1]), policy(bases[0]), policy(bases[0], tuned))
    loaded = load_policies(wanted, tiny.CPU)
    assert [one.files for one in loaded] == [*wanted]
    kinds = []
    for one in loaded:
        with one.active() as model:
            kinds.append(model.config.model_type)
    assert kinds == ["llama", "gpt2", "llama", "llama"]
    with pytest.raises(InputError, match="does not belong to this base"):
        load_policies((policy(bases[1], tuned),), tiny.CPU)
