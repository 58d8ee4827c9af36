"""Ask an OpenAI-compatible endpoint for chat completions.

Requests are repeated and limited in their rate, and no message, log or reply holds the address or the key.
"""

import email.utils
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential
from tenacity.stop import stop_before_delay

from tasks.judges.chat_reply import read_completion
from tasks.judges.verdict_cache import Reply
from tasks.system.errors import InputError

MAX_GARBLED = 3  # requests whose replies are no chat completion, before the endpoint is taken to be another
SHORTEST_KEY = 8  # characters; a server without keys is given any word
SHOWN = 200  # characters of a server's error that are shown
MAX_PAUSE = 60.0  # seconds between two tries, unless the server asks for more
TRANSIENT = {408, 409, 425, 429}  # and 5xx
NEW_LIMIT = "max_completion_tokens"  # in place of max_tokens
OUT_OF_MONEY = {"insufficient_quota", "billing_hard_limit_reached"}  # a 429 that no waiting ends

_jittered = wait_random_exponential(multiplier=0.5, max=MAX_PAUSE)


class Address(NamedTuple):
    """Where the endpoint is, and the key that it asks for. Neither is ever shown."""

    url: str
    key: str

    def __repr__(self) -> str:
        return "Address(...)"

    def digest(self) -> str:
        """Return the sha256 of scheme, host, port and path, by which the server is known in keys.

        Raises InputError.
        """
        check_url(self.url)
        url = httpx.URL(self.url)  # without a port that is the scheme's own
        place = f"{url.scheme}://{url.host}:{url.port or ''}{url.path.rstrip('/')}"
        return hashlib.sha256(place.encode()).hexdigest()

    def redact(self, text: str) -> str:
        """Return a server's message without the key and the address."""
        for secret in (self.url, httpx.URL(self.url).host):
            text = text.replace(secret, "***")
        return self.redact_key(text)

    def redact_key(self, text: str) -> str:
        """Return a text without the key, unless that is a word that only stands in for one."""
        return text.replace(self.key, "***") if len(self.key) >= SHORTEST_KEY else text


class Limits(NamedTuple):
    """How often and how long the endpoint is asked."""

    requests_per_minute: int | None
    timeout: float  # seconds without a sign of a reply
    patience: float  # seconds for which one request is repeated


class Stopped(Exception):
    """Another request has ended the run, so this one is not sent."""


class _Unavailable(Exception):
    """The endpoint did not answer, or asked to be asked later."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds


class _Garbled(_Unavailable):
    """The endpoint answered with something that is no chat completion."""


class ChatClient:
    """A connection to the endpoint, which threads share. It is used as a context manager."""

    def __init__(
        self,
        address: Address,
        limits: Limits,
        *,
        stop: threading.Event,
        on_lost: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Raises InputError if the address is none.

        Setting ``stop`` ends all waiting. ``on_lost`` is called with a request whose reply did not come,
        broke off or cannot be read: it may have to be paid all the same.
        """
        for name in ("httpx", "httpcore"):  # they log addresses and headers
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address, self.limits, self.stop, self.on_lost = address, limits, stop, on_lost
        self._client = _open(address, limits.timeout)
        self._guard = threading.Lock()
        self._next_start = 0.0
        self._renames_limit = False

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, request: dict[str, Any]) -> Reply:
        """Return the reply, of which token counts are -1 if the endpoint does not report them.

        Raises InputError if the endpoint refuses the request, or did not answer within the patience;
        Stopped.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(_Unavailable),
            wait=_wait,
            stop=self._is_over,
            sleep=self._pause,
            reraise=True,
        )
        self._wait_for_turn()
        started = time.monotonic()
        try:
            return retrying(self._send, request)
        except _Garbled as error:
            raise InputError(
                f"The judge's endpoint does not speak the protocol of chat completions ({error}): name its "
                "base URL, which often ends in /v1, in ALIGNFLOW_JUDGE_URL"
            ) from None
        except _Unavailable as error:
            if self.stop.is_set():
                raise Stopped from None
            raise self._lost_patience(error, time.monotonic() - started) from None

    def _lost_patience(self, error: _Unavailable, waited: float) -> InputError:
        """Return the error for a request that is given up ``waited`` seconds after its first try."""
        patience = self.limits.patience
        if error.retry_after and waited + error.retry_after > patience:
            return InputError(
                f"The judge's endpoint asks to wait {error.retry_after:,.0f} s, longer than judge.patience "
                f"({patience:g} s) allows: raise it, or start again later ({error})"
            )
        return InputError(f"The judge's endpoint did not answer a request for {patience:g} s ({error})")

    def _is_over(self, state: RetryCallState) -> bool:
        """Return whether a request is not repeated: out of patience, no chat completions, or stopped."""
        error = state.outcome.exception() if state.outcome else None
        is_no_endpoint = isinstance(error, _Garbled) and state.attempt_number >= MAX_GARBLED
        return is_no_endpoint or self.stop.is_set() or stop_before_delay(self.limits.patience)(state)

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        """Wait until the rate limit allows one more request. Raises Stopped."""
        if self.limits.requests_per_minute:
            with self._guard:
                start = max(time.monotonic(), self._next_start)
                self._next_start = start + 60 / self.limits.requests_per_minute
            self.stop.wait(max(0.0, start - time.monotonic()))
        if self.stop.is_set():
            raise Stopped

    def _send(self, request: dict[str, Any]) -> Reply:
        sent = _rename_limit(request) if self._renames_limit else request
        response = self._post(sent)
        if "max_tokens" in sent and _refuses_limit(response):
            self._renames_limit = True
            response = self._post(_rename_limit(request))
        if response.status_code != httpx.codes.OK:
            raise self._failure(response)
        try:
            reply = read_completion(response.json())
        except ValueError as error:  # of which the JSON's is one
            self.on_lost(request)
            raise _Garbled(str(error)[:SHOWN]) from None
        return reply._replace(text=self.address.redact_key(reply.text))

    def _post(self, request: dict[str, Any]) -> httpx.Response:
        """Return the server's response. Raises _Unavailable, _Garbled."""
        try:
            return self._client.post("chat/completions", json=request)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            self.on_lost(request)
            raise _Unavailable(type(error).__name__) from None
        except httpx.TransportError as error:
            if isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):  # it broke off
                self.on_lost(request)
            raise _Unavailable(self.address.redact(f"{type(error).__name__}: {error}")) from None
        except httpx.DecodingError as error:
            self.on_lost(request)
            raise _Garbled(type(error).__name__) from None
        except httpx.InvalidURL as error:
            raise _Garbled(type(error).__name__) from None

    def _failure(self, response: httpx.Response) -> Exception:
        """Return the exception for a reply that is no success."""
        status, (code, text) = response.status_code, self._server_error(response)
        said = f"status {status}" + (f": {text}" if text else "")
        if code in OUT_OF_MONEY:
            return InputError(f"The account of the judge's endpoint has no money left ({said})")
        if status in TRANSIENT or status >= 500:
            return _Unavailable(said, _retry_after(response.headers.get("retry-after", "")))
        if status in (401, 403):
            return InputError(f"The judge's endpoint refuses the key in ALIGNFLOW_JUDGE_KEY ({said})")
        if status == 404:
            return InputError(
                f"The judge's endpoint has no such model or no chat completions ({said}): correct "
                "judge.model, or ALIGNFLOW_JUDGE_URL, which often ends in /v1"
            )
        if 300 <= status < 400:
            return InputError(
                f"The judge's endpoint is elsewhere (status {status}): name its final address in "
                "ALIGNFLOW_JUDGE_URL"
            )
        advice = ": set judge.temperature to null or 1" if status == 400 and "temperature" in text else ""
        return InputError(f"The judge's endpoint refuses a request ({said}){advice}")

    def _server_error(self, response: httpx.Response) -> tuple[str, str]:
        """Return the code and the text of a server's error, without secrets and control characters."""
        code, text = "", response.text
        with suppress(ValueError):
            body = response.json()
            error = body.get("error", body) if isinstance(body, dict) else body
            if isinstance(error, dict):
                code = str(error.get("code") or error.get("type") or "")
                text = str(error.get("message") or error.get("detail") or text)
        shown = " ".join("".join(char if char.isprintable() else " " for char in text).split())
        return code, self.address.redact(shown)[:SHOWN]


def _refuses_limit(response: httpx.Response) -> bool:
    """Return whether the model refuses max_tokens and names the newer field, as OpenAI's since o1 do."""
    return response.status_code == httpx.codes.BAD_REQUEST and NEW_LIMIT in response.text


def _rename_limit(request: dict[str, Any]) -> dict[str, Any]:
    return {NEW_LIMIT if name == "max_tokens" else name: value for name, value in request.items()}


def _open(address: Address, timeout: float) -> httpx.Client:
    """Return a client that takes nothing from the environment: no proxy, no login of a .netrc file."""
    check_url(address.url)
    if not re.fullmatch(r"[!-~]+", address.key):  # a refused header would be in the error, with the key
        raise InputError(
            "ALIGNFLOW_JUDGE_KEY has characters that no key has, such as a space or the end of a line: "
            "remove them"
        )
    try:
        return httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.key}"},
            timeout=timeout,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )
    except (UnicodeError, httpx.InvalidURL):
        raise InputError(
            "ALIGNFLOW_JUDGE_URL is no address, or ALIGNFLOW_JUDGE_KEY has characters that no key has"
        ) from None


def check_url(url: str) -> None:
    """Raise InputError unless ``url`` is the address of a web server, without a login."""
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise InputError("ALIGNFLOW_JUDGE_URL is no address such as https://HOST/v1") from None
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", parts.host):
        raise InputError("ALIGNFLOW_JUDGE_URL is no address such as https://HOST/v1")
    if parts.userinfo:
        raise InputError("ALIGNFLOW_JUDGE_URL holds a login: the key belongs into ALIGNFLOW_JUDGE_KEY")


def _wait(state: RetryCallState) -> float:
    """Return the seconds before the next try: what the server asks for, and a growing random part."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, _Unavailable) else 0.0
    return asked + _jittered(state)


def _retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header names, as a number or a date; 0 if it names none."""
    with suppress(ValueError):
        return max(0.0, float(value)) if float(value) < 1e6 else 0.0
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
