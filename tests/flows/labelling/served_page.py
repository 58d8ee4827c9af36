"""Serve the page on which people label to a browser."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn

from flows.labelling.label_queue import LabelQueue
from flows.labelling.page import create_app

TOKEN = "right"


@contextlib.contextmanager
def serving(queue: LabelQueue) -> Iterator[str]:
    """Serve the page from a thread; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(queue, token=TOKEN)
        served = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            served.should_exit = True
            thread.join()
