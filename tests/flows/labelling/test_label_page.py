"""Test the page on which people label: who may, and in a real browser by keyboard."""

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect
from starlette.testclient import TestClient

from flows.labelling import server
from flows.labelling.label_queue import LabelQueue
from flows.labelling.page import HEADER, MAX_BODY, VALUE, create_app
from tasks.rounds.label_log import Label, read_labels
from tasks.system.errors import InputError
from tests.flows.labelling.served_page import serving
from tests.support.pages.browser import open_browser
from tests.tasks.rounds.made_rounds import make_pairs

OWN = {HEADER: VALUE}
ANN = {"rater": "Ann"}
MARKUP = ("<script>document.title = 'attacked'</script><b>bold</b>", "<img src=x onerror=alert(1)>")


@pytest.fixture
def queue(tmp_path: Path) -> LabelQueue:
    pairs = make_pairs(6, gold=1)
    pairs[0] |= dict(zip(("first", "second"), MARKUP, strict=True))
    turns = [("user", "What is it?"), ("assistant", "A thing."), ("user", "Which?")]
    pairs[1]["messages"] = [{"role": role, "content": content} for role, content in turns]
    return LabelQueue(tmp_path, pairs, overlap=0.0, title="round 1 of rounds")


def open_client(queue: LabelQueue, url: str = "http://127.0.0.1:8765") -> TestClient:
    return TestClient(create_app(queue, token="right"), base_url=url)  # type: ignore[arg-type]


def test_only_who_has_the_token_gets_the_page_and_a_pair(queue: LabelQueue) -> None:
    client = open_client(queue)
    for address in ("/", "/?token=wrong", "/?token="):
        answer = client.get(address)
        assert (answer.status_code, "alignflow label" in answer.text) == (403, True)
    for wrong in ({}, {"cookie": "alignflow-label-8765=wrong"}):
        assert client.post("/next", json=ANN, headers=OWN | wrong).status_code == 403
        assert client.get("/", headers=wrong).status_code == 403
    assert "Which answer is better?" in client.get("/?token=right").text
    cookie = client.get("/?token=right", follow_redirects=False).headers["set-cookie"]
    assert cookie.startswith("alignflow-label-8765=")  # a host's ports share their cookies
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    answer = client.post("/next", json=ANN, headers=OWN)
    pair = answer.json()["pair"]
    assert pair["pair_id"] == "0" * 32
    assert set(pair) == {"pair_id", "question", "left", "right", "html"}
    assert set(pair["html"]) == {"question", "left", "right"}
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    "headers",
    [
        {},  # of a form on another page, which cannot set it
        OWN | {"origin": "https://evil.example"},
        OWN | {"origin": "null"},
        OWN | {"host": "evil.example:8765"},  # a name that its owner has pointed at this machine
    ],
)
def test_requests_of_other_pages_and_hosts_are_refused(queue: LabelQueue, headers: dict[str, str]) -> None:
    client = open_client(queue)
    client.get("/?token=right")
    sent = {"rater": "Ann", "pair_id": "0" * 32, "verdict": "left"}
    assert client.post("/label", json=sent, headers=headers).status_code == 403
    assert not queue.labels()
    assert client.post("/label", json=sent, headers=OWN | {"origin": "http://127.0.0.1:8765"}).is_success
    assert len(queue.labels()) == 1


LONG = {**ANN, "pair_id": "0" * 32, "verdict": "left", "more": "x" * MAX_BODY}


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'"x"', b"[" * 5000, json.dumps(LONG).encode()])
def test_a_request_that_is_no_label_is_refused(queue: LabelQueue, body: bytes) -> None:
    client = open_client(queue)
    client.get("/?token=right")
    answer = client.post("/label", content=body, headers=OWN)
    assert (answer.status_code, set(answer.json())) == (400, {"problem"})


def test_a_port_that_is_taken_is_refused_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^127.0.0.1:{port} cannot be listened on .*--port"):
            server._listen("127.0.0.1", port)


def wait_for_labels(folder: Path, count: int) -> list[Label]:
    deadline = time.monotonic() + 400
    while len(labels := read_labels(folder)) != count:
        assert time.monotonic() < deadline, labels
        time.sleep(0.05)
    return labels


@pytest.mark.slow
def test_a_person_labels_by_keyboard(queue: LabelQueue, tmp_path: Path) -> None:
    with serving(queue) as address, open_browser() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        errors: list[Any] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(f"{address}?token=right")
        assert page.url == address  # the token is not left in the address
        page.fill("#name", "Ann")
        page.keyboard.press("Enter")

        # 1. The two answers stand side by side, as text.
        page.wait_for_selector("#pair:not([hidden])")
        shown = [page.inner_text(f"#{side}") for side in ("left", "right")]
        assert {*shown} == {*MARKUP}
        assert page.title() != "attacked"
        boxes = [page.locator("article").nth(number).bounding_box() for number in range(2)]
        assert boxes[0]
        assert boxes[1]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]

        # 2. Each key gives its verdict; undo withdraws the last one.
        for number, key in enumerate("12u2tbs1", start=1):
            count = number if number < 3 else number - 2
            page.keyboard.press(key)
            expect(page.locator("#done")).to_have_text(str(count))
            if count == 1:
                assert (
                    page.inner_text("#question").split()
                    == "user What is it? assistant A thing. user Which?".split()
                )
        page.wait_for_selector("#end:not([hidden])")
        assert page.inner_text("#end-title") == "All pairs have a label"
        assert page.inner_text(".count") == "6 of 6 pairs labelled"
        assert not errors

        # 3. A narrow window has one answer below the other and nothing beyond its edge.
        page.keyboard.press("u")
        page.wait_for_selector("#pair:not([hidden])")
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    labels = wait_for_labels(tmp_path, 5)
    assert [one.verdict for one in labels[2:]] == ["tie", "both_bad", "skip"]
    assert [one.shown_first for one in labels[:2]] == [
        labels[0].verdict,
        {"first": "second", "second": "first"}[labels[1].verdict],
    ]
    assert {(one.rater, one.source) for one in labels} == {("Ann", "people")}
    assert all(one.seconds is not None for one in labels)
