"""Serve chat completions on loopback, and misbehave as a test says."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

KEY = "sk-secret-0123456789"


class Answer(NamedTuple):
    """What the server sends back."""

    status: int = 200
    text: str = "More helpful: A"
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None  # in place of a chat completion
    breaks_off: bool = False  # the connection is closed after half of the body
    finish_reason: str = "stop"
    has_usage: bool = True
    hangs: bool = False  # until the server is released; then the connection is closed without a reply


Behave = Callable[[str, int], Answer]  # of a prompt and how often it was asked before


class ChatServer:
    """Counts the requests and the paid replies of every prompt: a reply counts when it has been sent."""

    def __init__(self, behave: Behave, port: int = 0) -> None:
        self.behave = behave
        self.asked: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.most_at_once = self.now = self.hanging = 0
        self.requests: list[dict[str, Any]] = []
        self.authorizations: set[str] = set()
        self.guard = threading.Lock()
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    served._serve(self, request)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        prompt = request["messages"][0]["content"]
        with self.guard:
            before = self.asked[prompt]
            self.asked[prompt] += 1
            self.requests.append(request | {"path": handler.path})
            self.authorizations.add(str(handler.headers.get("Authorization")))
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        answer = self.behave(prompt, before)
        with self.guard:
            self.hanging += answer.hangs
        if answer.hangs:
            self.released.wait(900)
            handler.close_connection = True
        with self.guard:
            self.now -= 1
            self.hanging -= answer.hangs
        if not answer.hangs:
            self._send(handler, answer)
            with self.guard:
                self.paid[prompt] += answer.status == 200 and answer.body is None and not answer.breaks_off

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        choice = {
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
        }
        completion: dict[str, Any] = {"choices": [choice]}
        if answer.has_usage:
            completion["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        body = (json.dumps(completion) if answer.body is None else answer.body).encode()
        handler.send_response(answer.status)
        for name, value in (*answer.headers, ("Content-Length", str(len(body)))):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if answer.breaks_off else body)
        handler.close_connection |= answer.breaks_off

    def die(self) -> None:
        """Close the port; connections that are open end with their next request."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(behave: Behave = lambda prompt, before: Answer(), *, port: int = 0) -> Iterator[ChatServer]:
    """Yield a running server, on a free port unless one is named."""
    server = ChatServer(behave, port)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.die()
        thread.join(10)
