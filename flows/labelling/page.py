"""Build the page on which people label pairs, as an ASGI application.

Who has the token may label: the address that `alignflow label` prints has it, and it is kept in a cookie.
Requests that name another host, or come from a page of another origin, are refused.
"""

import hmac
import json
import socket
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from flows.labelling.label_queue import LabelQueue
from flows.labelling.rendered_markdown import render_markdown
from tasks.system.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(__file__).parent
MAX_BODY = 10_000  # bytes
HEADER, VALUE = "x-alignflow", "label"  # which a form or link of another page cannot send
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NO_TOKEN = "Open the address that `alignflow label` has printed: it ends with the token of this page.\n"  # noqa: S105


def create_app(queue: LabelQueue, *, token: str, host: str = "127.0.0.1") -> "ASGIApp":
    """Return the page on a queue of pairs. ``host`` is the one that the server listens on."""

    async def page(request: Request) -> Response:
        if _is_equal(request.query_params.get("token"), token):
            answer: Response = RedirectResponse("./", status_code=303)
            answer.set_cookie(_cookie(request), token, httponly=True, samesite="strict")
            return answer
        if not _is_equal(request.cookies.get(_cookie(request)), token):
            return PlainTextResponse(NO_TOKEN, status_code=403)
        return FileResponse(FOLDER / "page.html")

    def posting(function: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
        async def answer(request: Request) -> Response:
            if not _is_equal(request.cookies.get(_cookie(request)), token):
                return _refuse(403, NO_TOKEN)
            if request.headers.get(HEADER) != VALUE:
                return _refuse(403, "This request does not come from the page.")
            try:
                content = await _read_json(request)
                return JSONResponse(await run_in_threadpool(lambda: add_html(function(content))))
            except InputError as error:
                return _refuse(400, str(error))

        return answer

    def show_next(content: dict[str, Any]) -> dict[str, Any]:
        return queue.show_next(content.get("rater", ""))

    def label(content: dict[str, Any]) -> dict[str, Any]:
        pair_id, verdict = (str(content.get(name, "")) for name in ("pair_id", "verdict"))
        return queue.label(content.get("rater", ""), pair_id, verdict, content.get("seconds"))

    def undo(content: dict[str, Any]) -> dict[str, Any]:
        return queue.undo(content.get("rater", ""))

    functions = {"next": show_next, "label": label, "undo": undo}
    files = [Route(f"/{name}", _serve(name)) for name in ("page.css", "page.js")]
    posts = [Route(f"/{name}", posting(one), methods=["POST"]) for name, one in functions.items()]
    return Guard(Starlette(routes=[Route("/", page), *files, *posts]), host)


def add_html(state: dict[str, Any]) -> dict[str, Any]:
    """Return what the queue says with the HTML of its pair's texts; "" for a text to be shown as it is."""
    pair = state["pair"]
    if not pair:
        return state
    html = {side: render_markdown(pair[side]) for side in ("left", "right")}
    turns = [render_markdown(turn["content"]) for turn in pair["question"]]
    return state | {"pair": pair | {"html": html | {"question": turns}}}


def _serve(name: str) -> Callable[..., Any]:
    async def answer(_: Request) -> Response:
        return FileResponse(FOLDER / name)

    return answer


def _cookie(request: Request) -> str:
    """Return the name of the cookie: browsers send a host's cookies to all of its ports."""
    return f"alignflow-label-{request.url.port or 80}"


def _is_equal(given: str | None, token: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


def _refuse(status: int, sentence: str) -> Response:
    return JSONResponse({"problem": sentence.strip()}, status_code=status)


async def _read_json(request: Request) -> dict[str, Any]:
    """Return the content of a request. Raises InputError."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise InputError("The request is too long")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # the last one: nested too deeply
        content = None
    if not isinstance(content, dict):
        raise InputError("The request is no JSON object")
    return content


class Guard:
    """Refuse requests that name another host or come from another origin, and add headers to all answers."""

    def __init__(self, app: "ASGIApp", host: str) -> None:
        self.app, self.host = app, host

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] == "http" and not self._is_own(Headers(scope=scope)):
            await PlainTextResponse("Another host or origin.\n", 403)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _is_own(self, headers: Headers) -> bool:
        """Return whether a request is for this host, not for a name that another one's owner has chosen."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return False
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in {"localhost", self.host, socket.gethostname(), socket.getfqdn()} or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
