"""Judge answers by a model behind an OpenAI-compatible endpoint, which costs money.

Every reply is written to the verdict cache before it counts, so a run that is killed, or ended by the cost
limit or a dead server, goes on without paying twice.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from random import shuffle
from typing import Any, NamedTuple

from tasks.judges import fill_prompt
from tasks.judges.chat_client import Address, ChatClient, Limits, Stopped
from tasks.judges.judge import Battle, ReportProgress
from tasks.judges.parse_verdict import parse_verdict
from tasks.judges.prompt_encoder import cut_warnings, room_warnings, share_room
from tasks.judges.verdict_cache import Reply, VerdictCache, reply_key
from tasks.rlhf.judging.verdicts import Verdict
from tasks.system.errors import InputError

BYTES_PER_TOKEN = 3  # to estimate: English has 4 or more, most other languages about 3
LEAST_CHARACTERS = 40  # that are left of each answer


class Settings(NamedTuple):
    """What the endpoint is asked, and what that may cost."""

    template: str
    model: str
    temperature: float | None  # None: not sent
    max_reply_tokens: int
    max_prompt_characters: int
    concurrency: int
    prompt_price: float  # of a million tokens
    reply_price: float  # of a million tokens
    max_cost: float


class Estimate(NamedTuple):
    """What verdicts will cost at most, if their prompts' tokens are guessed right."""

    num_prompts: int
    num_known: int  # of them, whose replies are in the cache
    prompt_tokens: int  # of the others
    reply_tokens: int  # of the others, if all replies are as long as they may be
    cost: float  # of the others
    spent: float  # what the known ones cost when they were asked, and what this judge has paid
    max_cost: float

    def __str__(self) -> str:
        return (
            f"{self.num_prompts:,} prompts for the judge, {self.num_known:,} of them answered already: about "
            f"{self.prompt_tokens:,} prompt and at most {self.reply_tokens:,} reply tokens, so at most about "
            f"{self.cost:.4g} beside {self.spent:.4g} spent; judge.max_cost is {self.max_cost:.4g}"
        )


class EndpointJudge:
    """A model that is shown both answers by a server, and writes its verdict."""

    name = "lm"
    about = (
        "It read the question and both answers, and wrote its verdict; a reply without one counts nowhere."
    )

    def __init__(
        self,
        title: str,
        address: Address,
        cache: VerdictCache,
        settings: Settings,
        limits: Limits,
        *,
        spent: float = 0.0,
        announce: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        """Raises InputError if the address is none.

        ``spent`` is what other verdicts have cost that count too. ``announce`` is called with what verdicts
        will cost, before the first request for them.
        """
        self.title, self.cache, self.settings, self.announce = title, cache, settings, announce
        self._address, self._limits = address, limits
        self._server = address.digest()
        self._costs: dict[str, float] = {}  # of every verdict that was used, by key
        self._verdict_cost = 0.0  # their sum
        self._lost_cost = 0.0  # of requests whose reply was lost
        self._spent_before = spent
        self._guard = threading.Lock()
        self._was_cut: dict[str, bool] = {}  # by prompt
        self._without_room: set[str] = set()  # prompts
        self._was_ended: dict[str, bool] = {}  # by key

    @property
    def spent(self) -> float:
        """Return what all verdicts that were used cost, whenever they were asked, and requests in vain."""
        with self._guard:
            return self._spent_before + self._verdict_cost + self._lost_cost

    def estimate(self, battles: Sequence[Battle]) -> Estimate:
        """Return what the verdicts on battles will cost at most. Sends nothing."""
        prompts = self._prompts(battles)
        known = self.cache.read(prompts)
        return self._estimate(prompts, known)

    def refuse_unaffordable(self, battles: Sequence[Battle]) -> None:
        """Say what the verdicts cost at most. Raises InputError if that is more than max_cost."""
        self._refuse_unaffordable(self.estimate(battles))

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Return the verdicts; those that are known cost nothing. "unparseable": the question left no room.

        Raises InputError before the first request if the estimate exceeds max_cost; later if the cost has
        reached it, or the endpoint fails. The replies that came until then are kept.
        """
        prompts = self._prompts(battles)
        keys = list(prompts)
        known = self.cache.read(keys)
        for key, reply in known.items():
            self._count(key, reply)
        self._refuse_unaffordable(self._estimate(prompts, known))
        missing = {key: prompts[key] for key in keys if key not in known}
        if missing:
            self._ask_all(missing, len(keys), report_progress)
            known |= self.cache.read(missing)
        self._was_ended |= {key: reply.is_complete for key, reply in known.items()}
        verdicts = {key: parse_verdict(one.text, is_complete=one.is_complete) for key, one in known.items()}
        filled = map(self._fill, battles)
        return ["unparseable" if one is None else verdicts[self._key(one)] for one in filled]

    def _prompts(self, battles: Sequence[Battle]) -> dict[str, str]:
        """Return the battles' prompts by key, each once, but of battles whose question leaves no room.

        Raises InputError if that holds for all of them.
        """
        prompts = {self._key(one): one for one in map(self._fill, battles) if one is not None}
        if battles and not prompts:
            raise InputError(
                "judge.max_prompt_characters: every question with its prompt takes so much of "
                f"{self.settings.max_prompt_characters:,} characters that no answers fit: raise it"
            )
        return prompts

    def _key(self, prompt: str) -> str:
        asked = self.settings
        return reply_key(
            prompt,
            server=self._server,
            model=asked.model,
            temperature=asked.temperature,
            max_reply_tokens=asked.max_reply_tokens,
        )

    def _fill(self, battle: Battle) -> str | None:
        """Return a prompt; None if the question leaves no room for the answers.

        If it is too long both answers are cut at their ends.
        """
        texts = (battle.question, battle.first.text, battle.second.text)
        question, first, second = map(fill_prompt.break_control_tokens, texts)
        prompt = fill_prompt.fill(self.settings.template, question, first, second)
        limit = self.settings.max_prompt_characters
        is_cut = len(prompt) > limit
        room = limit - (len(prompt) - len(first) - len(second))
        while len(prompt) > limit and room > 2 * LEAST_CHARACTERS:
            lengths = share_room(room, len(first), len(second))
            prompt = fill_prompt.fill(
                self.settings.template, question, first[: lengths[0]], second[: lengths[1]]
            )
            room -= max(1, len(prompt) - limit)  # a line may have been indented
        if len(prompt) > limit:
            self._without_room.add(prompt)
            return None
        self._was_cut[prompt] = is_cut
        return prompt

    def _estimate(self, prompts: dict[str, str], known: dict[str, Reply]) -> Estimate:
        missing = [prompt for key, prompt in prompts.items() if key not in known]
        tokens = sum(map(_guess_tokens, missing)), len(missing) * self.settings.max_reply_tokens
        unused = sum(self._price(one) for key, one in known.items() if key not in self._costs)
        return Estimate(
            num_prompts=len(prompts),
            num_known=len(known),
            prompt_tokens=tokens[0],
            reply_tokens=tokens[1],
            cost=self._cost(*tokens),
            spent=self.spent + unused,
            max_cost=self.settings.max_cost,
        )

    def _refuse_unaffordable(self, estimate: Estimate) -> None:
        if estimate.num_known < estimate.num_prompts:
            self.announce(str(estimate))
            if estimate.spent + estimate.cost > estimate.max_cost:
                raise InputError(
                    f"Nothing was asked: {estimate}; raise it, or lower judge.num_questions, "
                    "judge.num_graded_pairs, ppo.score.prompts or judge.max_reply_tokens"
                )

    def _ask_all(self, missing: dict[str, str], total: int, report_progress: ReportProgress) -> None:
        """Ask for replies, several at a time, until all are in the cache. Raises InputError."""
        stop = threading.Event()
        keys = list(missing)
        shuffle(keys)  # two runs at the same time ask for different ones, and share the replies
        done = total - len(missing)
        with ChatClient(self._address, self._limits, stop=stop, on_lost=self._count_lost) as client:
            pool = ThreadPoolExecutor(self.settings.concurrency)
            waiting = [pool.submit(self._ask, key, missing[key], client) for key in keys]
            try:
                for future in as_completed(waiting):
                    if isinstance(future.exception(), Stopped):  # by the failure of another, which follows
                        continue
                    future.result()
                    done += 1
                    report_progress(done, total)
            except InputError as error:
                stop.set()
                pool.shutdown(cancel_futures=True)  # waits for the requests that are on their way
                kept = total - len(missing) + sum(map(_is_done, waiting))
                raise type(error)(
                    f"{str(error).rstrip('.')}; {kept:,} of {total:,} replies are kept, so the same command "
                    "goes on from them"
                ) from None
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _ask(self, key: str, prompt: str, client: ChatClient) -> None:
        """Write a reply to the cache, then count it; a failure stops all. Raises InputError, Stopped."""
        try:
            self._pay(key, prompt, client)
        except Stopped:
            raise
        except Exception:
            client.stop.set()
            raise

    def _pay(self, key: str, prompt: str, client: ChatClient) -> None:
        if client.stop.is_set():
            raise Stopped
        if known := self.cache.read([key]):  # another run has asked meanwhile
            self._count(key, known[key])
            return
        if (spent := self.spent) >= self.settings.max_cost:
            raise InputError(
                f"The judge has cost {spent:.4g}, judge.max_cost is {self.settings.max_cost:.4g}: raise it"
            )
        reply = client.ask(self._request(prompt))
        if reply.prompt_tokens < 0 or reply.reply_tokens < 0:  # the server does not count
            reply = reply._replace(
                prompt_tokens=_guess_tokens(prompt), reply_tokens=_guess_tokens(reply.text)
            )
        self.cache.write(key, self.settings.model, reply)
        self._count(key, reply)

    def _request(self, prompt: str) -> dict[str, Any]:
        degree = self.settings.temperature
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.settings.max_reply_tokens,
        } | ({} if degree is None else {"temperature": degree})

    def _count(self, key: str, reply: Reply) -> None:
        with self._guard:
            self._verdict_cost += self._price(reply) - self._costs.get(key, 0.0)
            self._costs[key] = self._price(reply)

    def _count_lost(self, request: dict[str, Any]) -> None:
        """Count what a request without a reply has cost at most: the server may have worked for it."""
        tokens = _guess_tokens(request["messages"][0]["content"])
        with self._guard:
            self._lost_cost += self._cost(tokens, self.settings.max_reply_tokens)

    def _price(self, reply: Reply) -> float:
        return self._cost(reply.prompt_tokens, reply.reply_tokens)

    def _cost(self, prompt_tokens: int, reply_tokens: int) -> float:
        asked = self.settings
        return (prompt_tokens * asked.prompt_price + reply_tokens * asked.reply_price) / 1e6

    def warnings(self) -> list[str]:
        """Return sentences on prompts that were cut or not asked, and on replies that were cut."""
        count = len(self._was_cut) + len(self._without_room)
        limit = f"{self.settings.max_prompt_characters:,} characters"
        found = cut_warnings(count, sum(self._was_cut.values()), limit)
        found += room_warnings(count, len(self._without_room), limit)
        if num_cut := len(self._was_ended) - sum(self._was_ended.values()):
            found.append(
                f"Of {len(self._was_ended):,} replies of the judge {num_cut:,} did not end within "
                f"{self.settings.max_reply_tokens:,} tokens: they count nowhere, except sole letters."
            )
        return found


def _is_done(future: "Future[None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _guess_tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)
