"""Test in a real browser how the page shows texts: as rendered Markdown, and as they were written."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from flows.labelling.label_queue import LabelQueue
from tests.flows.labelling.served_page import TOKEN, serving
from tests.support.pages.browser import open_browser
from tests.tasks.rounds.made_rounds import make_pairs

pytestmark = pytest.mark.slow

LINES = "```sh\necho " + "long " * 200 + "\n```"
MARKDOWN = f"# A heading\n\n- one\n- *two*\n\n{LINES}\n\n[a link](http://127.0.0.1/x)"
ONLY_DEFINED = "[a]: http://127.0.0.1/hidden"
HOSTILE = "\n\n".join(
    [
        "<script>document.title = 'attacked'</script>",
        "<img src=http://127.0.0.1:9/a onerror=\"document.title='attacked'\">",
        "<style>nav { display: none }</style><div id=pair onclick=x>",
        "![i](http://127.0.0.1:9/b.png) [l](javascript:alert(1)) [d](data:text/html,x)",
        "\u202eabc \u2066def " + "z\u0301" * 300,
        "a" * 5000,
        "> " * 15 + "deep",
        "- " * 8 + "deep",
        "999999999. a",
        "|a" * 300 + "\n" + "|-:" * 300 + "\n" + "|1" * 300,
        "```\nunclosed " + "x" * 5000,
    ]
)


def make_queue(folder: Path, *answers: str) -> LabelQueue:
    """Return a queue of a pair for each answer, which is both of its answers."""
    pairs = make_pairs(len(answers))
    for pair, answer in zip(pairs, answers, strict=True):
        pair |= {"first": answer, "second": answer, "prompt": "How do I use `this`?"}
    return LabelQueue(folder, pairs, overlap=0.0, title="round 1 of rounds")


def open_page(browser: Browser, address: str, noticed: list[Any]) -> Page:
    """Open the page as Ann; note errors, complaints, dialogs and requests to other servers."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.on("pageerror", lambda error: noticed.append(error))
    page.on("console", lambda message: noticed.append(message.text))
    page.on("dialog", lambda dialog: noticed.append(dialog.message))
    own = (address, "data:,")
    page.on("request", lambda sent: None if sent.url.startswith(own) else noticed.append(sent.url))
    page.goto(f"{address}?token={TOKEN}")
    page.fill("#name", "Ann")
    page.keyboard.press("Enter")
    page.wait_for_selector("#pair:not([hidden])")
    return page


def test_markdown_is_rendered_and_m_shows_what_was_written(tmp_path: Path) -> None:
    queue, noticed = make_queue(tmp_path, MARKDOWN, ONLY_DEFINED), list[Any]()
    with serving(queue) as address, open_browser() as browser:
        page = open_page(browser, address, noticed)
        left, button = page.locator("#left"), page.locator("#view")

        # 1. Rendered: code in a fixed width, whose lines scroll, and headings no larger than the question.
        expect(left.locator("li em")).to_have_text("two")
        assert page.locator("#question code").inner_text() == "this"
        assert "mono" in left.locator("pre code").evaluate("code => getComputedStyle(code).fontFamily")
        code = left.locator("pre")
        assert code.evaluate("pre => pre.scrollWidth > pre.clientWidth")
        sizes = [
            float(page.locator(place).evaluate("one => parseFloat(getComputedStyle(one).fontSize)"))
            for place in ("#left h3", "#question .turn")
        ]
        assert sizes[0] <= sizes[1]

        # 2. Arrows scroll code that has the focus; elsewhere they label.
        code.evaluate("pre => { pre.tabIndex = 0; pre.focus() }")
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(300)
        assert page.inner_text("#done") == "0"

        # 3. The source, exactly, for this pair and after loading the page again.
        page.keyboard.press("m")
        expect(button).to_have_attribute("aria-pressed", "true")
        assert left.evaluate("one => one.textContent") == MARKDOWN
        assert page.locator("#question .text").evaluate("one => one.textContent") == "How do I use `this`?"
        page.reload()
        page.wait_for_selector("#pair:not([hidden])")
        expect(button).to_have_attribute("aria-pressed", "true")
        assert left.evaluate("one => one.textContent") == MARKDOWN
        button.click()
        expect(left.locator("li em")).to_have_text("two")
        expect(button).to_have_attribute("aria-pressed", "false")

        # 4. A text of which nothing could be seen is shown as it is.
        page.locator("#view").evaluate("one => one.blur()")
        page.keyboard.press("1")
        expect(page.locator("#done")).to_have_text("1")
        expect(left).to_have_text(ONLY_DEFINED)
        page.keyboard.press("?")
        expect(page.locator("#help")).to_contain_text("exactly as it was written")
    assert not noticed


@pytest.mark.parametrize(
    ("answer", "shown_as"), [(HOSTILE, "rendered"), ("[" * 40_000, "rendered"), (HOSTILE * 10, "source")]
)
def test_a_hostile_answer_runs_nothing_loads_nothing_and_leaves_the_page_and_its_keys(
    tmp_path: Path, answer: str, shown_as: str
) -> None:
    queue, noticed = make_queue(tmp_path, answer, answer), list[Any]()
    with serving(queue) as address, open_browser() as browser:
        page = open_page(browser, address, noticed)
        expect(page.locator("#left")).to_have_class(f"text {shown_as}")
        for width in (1200, 380):
            page.set_viewport_size({"width": width, "height": 800})
            for _ in range(2):  # rendered and as it was written
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                for side in ("left", "right"):
                    box = page.locator(f'nav [data-verdict="{side}"]').bounding_box()
                    assert box
                    assert box["x"] >= 0
                    assert box["x"] + box["width"] <= width
                page.keyboard.press("m")
        assert page.title() == "Which answer is better? - alignflow"
        page.keyboard.press("2")
        expect(page.locator("#done")).to_have_text("1")
    assert not noticed
    (label,) = queue.labels()
    assert label.verdict != label.shown_first
