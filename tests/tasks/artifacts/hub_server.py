"""Serve folders as data sets and models by the protocol of the Hugging Face hub, as far as we ask for it."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

INFO = re.compile(r"/api/(?:datasets|models)/(\w+/\w+)(?:/revision/(\w+))?")
PATHS = re.compile(r"/api/(?:datasets|models)/(\w+/\w+)/(tree|paths-info)/(\w+)(?:/(.*))?")
FILE = re.compile(r"/(?:datasets/)?(\w+/\w+)/resolve/(\w+)/(.+)")


@contextmanager
def serve_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a hub, and the requests that it gets; its data sets and models are
    folder/OWNER/NAME.

    Each has the branch main, whose commit is a digest of the files.
    """
    requests: list[str] = []

    class Handler(_Handler):
        root = folder
        seen = requests

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Have this process and its children take ``address`` for the hub's."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    files = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)


class _Handler(BaseHTTPRequestHandler):
    root: Path
    seen: list[str]

    def do_GET(self) -> None:
        """Answer what a data set is, which files it has, and a file or a range of it."""
        address = self.path.partition("?")[0]
        self.seen.append(f"{self.command} {self.path}")
        if found := INFO.fullmatch(address):
            self._send_set(
                found[1], found[2] or "main", lambda files, commit: _describe(found[1], files, commit)
            )
        elif found := PATHS.fullmatch(address):
            below, wanted = found[4] or "", self._read_paths() if found[2] == "paths-info" else None
            self._send_set(found[1], found[3], lambda files, _: _list_entries(files, below, wanted))
        elif found := FILE.fullmatch(address):
            self._send_file(found[1], found[2], found[3])
        else:
            self._refuse("EntryNotFound")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _read_paths(self) -> set[str]:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        return set(parse_qs(body)["paths"])

    def _send_set(self, name: str, revision: str, answer: Any) -> None:
        if (found := self._open(name, revision)) is not None:
            self._send(json.dumps(answer(*found)).encode(), {"Content-Type": "application/json"})

    def _open(self, name: str, revision: str) -> tuple[dict[str, bytes], str] | None:
        """Return the files and the commit; None, and a refusal, if there are none."""
        place = self.root / name
        if not place.is_dir():
            return self._refuse("RepoNotFound")
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        files = {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}
        commit = sha1(repr(files).encode()).hexdigest()
        if revision not in ("main", commit):
            return self._refuse("RevisionNotFound")
        return files, commit

    def _send_file(self, name: str, revision: str, path: str) -> None:
        if (found := self._open(name, revision)) is None:
            return
        files, commit = found
        if path not in files:
            self._refuse("EntryNotFound", {"X-Repo-Commit": commit})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(files[path])}"', "Accept-Ranges": "bytes"}
        body, status = files[path], 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(body) - 1)}/{len(body)}"
            body, status = body[start : end + 1], 206
        self._send(body, headers, status)

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"{}", {**(headers or {}), "X-Error-Code": code}, 404)


def _digest(content: bytes) -> str:
    return sha1(content).hexdigest()


def _describe(name: str, files: dict[str, bytes], commit: str) -> dict[str, Any]:
    return {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": path} for path in files]}


def _list_entries(files: dict[str, bytes], below: str, wanted: set[str] | None) -> list[dict[str, Any]]:
    """Return the files and folders in a folder, or those of the wanted paths that exist."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": path, "oid": "0", "size": 0} for path in sorted(folders)
    ]
    for path, content in files.items():
        entries.append({"type": "file", "path": path, "oid": _digest(content), "size": len(content)})
    if wanted is not None:
        return [entry for entry in entries if entry["path"] in wanted]
    return [entry for entry in entries if not below or entry["path"].startswith(f"{below}/")]
