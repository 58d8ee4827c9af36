"""Serve the page on which people label, and keep MLflow up to date with the labels meanwhile."""

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from flows.labelling.announcing import announce_labels
from flows.labelling.label_queue import LabelQueue
from flows.labelling.page import create_app
from tasks.rounds.label_exchange import fetch_labels, publish_labels
from tasks.rounds.label_log import label_folder
from tasks.rounds.label_round import LabelRound, find_round, read_asked
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker

SYNC_SECONDS = 5.0
CLOSED = "The round has gone on with the labels that it had: nothing more is labelled. Thank you."
TOKEN_BYTES = 16


def open_queue(tracker: Tracker, one: LabelRound) -> LabelQueue:
    """Return the pairs of a round with all labels so far. Raises InputError."""
    fetch_labels(tracker, one)
    pairs = read_asked(tracker, one.key)
    return LabelQueue(label_folder(one.key), pairs, overlap=one.overlap, title=one.title)


def serve(
    tracker: Tracker, one: LabelRound, *, host: str, port: int, on_start: Callable[[str], None]
) -> LabelQueue:
    """Serve the page until Ctrl-C, and return its pairs with their labels.

    ``on_start`` is called with the page's address. Raises InputError if the address cannot be listened on.
    """
    queue = open_queue(tracker, one)
    listening = _listen(host, port)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    shown = "127.0.0.1" if host in ("", "0.0.0.0") else host  # noqa: S104 - the user has said so
    shown = f"[{shown}]" if ":" in shown else shown
    app = create_app(queue, token=token, host=host)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    stop = threading.Event()
    syncing = threading.Thread(target=_sync, args=(tracker, one, queue, stop), daemon=True)
    syncing.start()
    on_start(f"http://{shown}:{listening.getsockname()[1]}/?token={token}")
    try:
        with suppress(KeyboardInterrupt):  # uvicorn has ended on it
            server.run(sockets=[listening])
    finally:
        stop.set()
        syncing.join()
    return queue


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): --port names another port, "
            "0 a free one"
        ) from None


def _sync(tracker: Tracker, one: LabelRound, queue: LabelQueue, stop: threading.Event) -> None:
    """Publish new labels every few seconds and at the end, and announce that all are in."""
    published: list[str] = []
    while True:
        is_last = stop.wait(SYNC_SECONDS)
        now = find_round(tracker, one.key)
        queue.closed = CLOSED if now.frozen else ""
        held = [label.label_id for label in queue.labels()]
        if held != published and not queue.closed:
            publish_labels(tracker, now)
            published = held
        if queue.is_complete and not queue.closed:
            announce_labels(now.flow_run)
        if is_last:
            return
