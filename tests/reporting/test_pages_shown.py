"""Report and data card as people meet them: in MLflow's sandboxed frame, on paper, and with texts that hide something."""

import base64
import html
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Frame, Page, sync_playwright

from flows.display.run_summary import MARKER, stage_table
from flows.services.processes import PAGE_POLICY
from tasks.reporting.text import replace_invisible
from tests.reporting import test_data_card, test_run_report
from tests.support.supervised_home import CHROMIUM, CHROMIUM_OPTIONS

HOSTILE = "a\x00b\x07c\x1b[31md\x7fe\x85f\u202eg\u2066h\u2028i\ufeffj\ud800k"
LONG = "an_unbroken_name_of_a_metric_or_a_reason_" * 6
# MLflow shows an HTML artifact as a blob in a frame that may run scripts and nothing else
FRAME = """<script>
const url = URL.createObjectURL(new Blob([atob("{page}")], {{type: "text/html"}}));
document.body.innerHTML = `<iframe sandbox="allow-scripts" width="1000" height="700" src="${{url}}"></iframe>`;
</script>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as player:
        opened = player.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        yield opened
        opened.close()


def stages() -> list[dict[str, Any]]:
    row = {
        "key": "0" * 64,
        "cached": False,
        "seconds": 12345.6,
        "peak_mb": 12345.6,
        "metrics": {},
        "warnings": [],
    }
    return [{"name": name, **row} for name in ("data", LONG)]


def report_of(root: Path, **changes: Any) -> str:
    run = test_run_report.make_run(root)
    about = run.inputs["data"] / "card.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    return test_run_report.page_of(run).replace(MARKER, stage_table(stages()))


def card_of(**changes: Any) -> str:
    return test_data_card.page(test_data_card.card(**changes))


@pytest.fixture(params=["report", "card"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    dropped = {LONG: 3}
    return report_of(tmp_path, dropped=dropped) if request.param == "report" else card_of(dropped=dropped)


def framed(browser: Browser, folder: Path, page: str) -> tuple[Page, Frame]:
    """The page as MLflow's viewer has it."""
    encoded = base64.b64encode(page.encode("ascii", "xmlcharrefreplace")).decode()
    outer = f'<meta http-equiv="Content-Security-Policy" content="{PAGE_POLICY.partition("; frame-ancestors")[0]}; script-src \'unsafe-inline\'">'
    outer = outer.replace("script-src 'self' 'unsafe-eval'; ", "")
    (folder / "viewer.html").write_text(outer + "<body>" + FRAME.format(page=encoded))
    view = browser.new_page(viewport={"width": 1100, "height": 800})
    view.goto((folder / "viewer.html").as_uri())
    view.frame_locator("iframe").locator("h1").wait_for()
    return view, view.frames[1]


def test_the_places_of_a_page_are_reached_in_mlflows_frame(
    browser: Browser, tmp_path: Path, page: str
) -> None:
    view, frame = framed(browser, tmp_path, page)
    frame.add_style_tag(content="html { scroll-behavior: auto !important; }")
    for link in frame.locator("nav a").all():
        place = str(link.get_attribute("href")).removeprefix("#")
        frame.evaluate("scrollTo(0, 0)")
        box = link.bounding_box()
        assert box is not None
        view.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        shown = "id => { const box = document.getElementById(id).getBoundingClientRect(); return box.top > -20 && box.top < innerHeight - 60 }"
        assert frame.evaluate(shown, place), place
    view.close()


def test_no_link_blanks_mlflows_frame(browser: Browser, tmp_path: Path, page: str) -> None:
    view, frame = framed(browser, tmp_path, page)
    frame.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    kinds = {
        str(link.get_attribute("href")).partition("/")[0]: link for link in frame.locator("main a").all()
    }
    assert "https:" in kinds
    for link in kinds.values():
        link.click()
    view.wait_for_timeout(300)
    assert view.frames[1].locator("h1").count() == 1
    assert view.frames[1].url.startswith("blob:")
    view.close()


@pytest.mark.parametrize("width", [718, 1047])  # A4 and A4 turned, less Chromium's margins
def test_nothing_is_cut_on_paper(browser: Browser, tmp_path: Path, page: str, width: int) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 1000})
    view.goto((tmp_path / "page.html").as_uri())
    view.emulate_media(media="print")
    over = "[...document.querySelectorAll('main *')].filter(part => !part.closest('svg') && part.checkVisibility()"
    over += " && part.getBoundingClientRect().right > innerWidth).map(part => part.outerHTML.slice(0, 120))"
    assert view.evaluate(over) == []
    view.close()


def hidden(text: str) -> set[str]:
    """The characters of a text that are there but not seen, or that turn its direction."""
    return {
        letter
        for letter in text
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        or letter in "\u202a\u202b\u202d\u202e\u2066\ufeff"
    } - set("\n\t")


def test_controls_and_turns_of_direction_in_texts_are_seen(tmp_path: Path) -> None:
    assert replace_invisible(HOSTILE) == "a␀b␇c␛[31md␡e�f�g�h�i�j�k"
    assert replace_invisible("tab\tline\nend\r\n שלום é 👍🏽") == "tab\tline\nend\r\n שלום é 👍🏽"
    told = {"prompt": HOSTILE, "chosen": HOSTILE, "chosen_author_name": HOSTILE}
    data = test_run_report.make_run(tmp_path / "other").inputs["data"]
    (pair, *_) = json.loads((data / "card.json").read_text())["examples"]
    ours = test_data_card.card()["examples"][0] | told
    for text in (
        card_of(examples=[ours], site=HOSTILE),
        report_of(tmp_path, examples=[pair | told], site=HOSTILE),
    ):
        assert hidden(html.unescape(text)) == set()
        assert text.count("a␀b␇c␛[31md␡e�f�g�h�i�j�k") >= 3
        text.encode()
