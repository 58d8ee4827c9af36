"""Stand between a judge and a real chat server: pass requests on, and fail as a test says.

A reply of the server behind is paid. It is delivered if all of it was sent on, and lost otherwise.
"""

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

# busy: 429 with Retry-After, not passed on; slow: the reply is held back until release(), then dropped;
# cut: half of the reply's body is sent
Fault = Literal["none", "busy", "slow", "cut"]
Choose = Callable[[str, int], Fault]  # by a prompt and how often it was asked before


class FaultProxy:
    """Counts by prompt how often it was asked, refused, paid, delivered and lost."""

    def __init__(self, upstream: str, choose: Choose, port: int = 0) -> None:
        """``upstream`` is the base URL of the server behind."""
        self.choose = choose
        self.asked: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.holding = 0
        self.guard = threading.Lock()
        self.released = threading.Event()
        self.client = httpx.Client(base_url=upstream, timeout=900, trust_env=False)
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                proxy._serve(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        prompt = json.loads(body)["messages"][0]["content"]
        with self.guard:
            fault = self.choose(prompt, self.asked[prompt])
            self.asked[prompt] += 1
            self.refused[prompt] += fault == "busy"
        if fault == "busy":
            handler.send_response(429)
            handler.send_header("Retry-After", "1")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        try:
            reply = self.client.post(
                "chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
        except httpx.TransportError:  # the server behind is dead
            self._drop(handler, b"")
            return
        with self.guard:
            self.paid[prompt] += reply.status_code == 200
            self.holding += fault == "slow"
        if fault == "slow":
            self.released.wait(900)
        is_delivered = fault == "none" and _send(handler, reply)
        if fault != "none":
            self._drop(handler, reply.content if fault == "cut" else b"")
        with self.guard:
            self.holding -= fault == "slow"
            (self.delivered if is_delivered else self.lost)[prompt] += reply.status_code == 200

    def _drop(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Close the connection, after half of a body if there is one."""
        handler.close_connection = True
        with suppress(OSError):
            if body:
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body[: len(body) // 2])
                handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)

    def die(self) -> None:
        """Close the port and drop what is held; open connections end with their next request."""
        self.server.shutdown()
        self.server.server_close()
        self.choose = lambda prompt, before: "cut"
        self.released.set()


def _send(handler: BaseHTTPRequestHandler, reply: httpx.Response) -> bool:
    """Send a reply on; return whether the connection took all of it."""
    try:
        handler.send_response(reply.status_code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(reply.content)))
        handler.end_headers()
        handler.wfile.write(reply.content)
    except OSError:
        handler.close_connection = True
        return False
    return True


@contextmanager
def faults(
    upstream: str, choose: Choose = lambda prompt, before: "none", *, port: int = 0
) -> Iterator[FaultProxy]:
    """Yield a running proxy before the server at ``upstream``, on a free port unless one is named."""
    proxy = FaultProxy(upstream, choose, port)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.die()
        thread.join(10)
        proxy.client.close()
