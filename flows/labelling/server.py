"""Serve the page on which people label, and keep MLflow up to date with the labels meanwhile."""

import secrets
import socket
import sys
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
    """Return the pairs of a round with all labels so far. Raises InputError if it waits for none."""
    if one.frozen:
        raise InputError(f"No pairs wait for labels: {one.title}, the newest, has gone on with those it had")
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
    """Publish new labels every few seconds and at the end; labels stay in the log if a server is away."""
    published: list[str] = []
    is_last = False
    while not is_last:
        is_last = stop.wait(SYNC_SECONDS)
        try:
            published = _publish(tracker, one, queue, published)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"alignflow: the labels are kept here, but not published ({reason})", file=sys.stderr)


def _publish(tracker: Tracker, one: LabelRound, queue: LabelQueue, published: list[str]) -> list[str]:
    """Publish labels other than ``published`` (ids), and announce that all are in; return what is published.

    Closes the queue once the round has gone on.
    """
    now = find_round(tracker, one.key)
    queue.closed = CLOSED if now.frozen else ""
    held = [label.label_id for label in queue.labels()]
    if queue.closed:
        return published
    if held != published:
        publish_labels(tracker, now)
    if queue.is_complete:
        announce_labels(now.flow_run)
    return held
