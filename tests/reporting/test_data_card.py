"""Test the data card's page: every count is on it, it fits a phone, and no text becomes markup."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.config.sections.data import Data
from tasks.reporting.data_card import TEMPLATE
from tasks.reporting.histograms import MOST_COLUMNS, draw_histograms
from tasks.reporting.numbers import format_share
from tasks.reporting.pages import STYLE
from tasks.reporting.text import build_link, clip_text, link_author
from tests.support.pages.html_tags import Tags
from tests.support.paths import ROOT
from tests.support.reports import CARD, PAIR, make_card, render_card

EVIL = '"><script>alert("x")</script></title></style></pre><img src=x onerror=alert(1)>\'{{ 7*7 }}'
BAD_LINKS = (
    "javascript:alert(1)",
    "//a.org/q/1",
    "data:text/html,<script>1</script>",
    'https://a.org/" onclick="alert(1)',
    "",
)
OPTIONAL = ("rules", "masked", "gaps", "answers_per_question")


def hostile(value: Any) -> Any:
    """Return the card with every text and every name in it turned into an attack."""
    if isinstance(value, dict):
        return {
            EVIL + key if key[0].isupper() or " " in key or "." in key else key: hostile(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return EVIL + value if isinstance(value, str) else value


def evil_card() -> dict[str, Any]:
    evil = hostile(make_card()) | {"kind": "stack-exchange"}
    evil["rules"] |= {EVIL: EVIL, "against": [EVIL]}
    evil["masked"] |= {EVIL: 3}
    evil["examples"] = [
        evil["examples"][0] | {"question_url": bad, "chosen_author": bad, "prompt": "x" * 2000 + EVIL}
        for bad in BAD_LINKS
    ]
    return evil


def counts_of(value: Any) -> Iterator[int]:
    if isinstance(value, dict):
        for name, item in value.items():
            if (
                name not in ("score", "gap", "answers", "from", "below")
                or isinstance(item, dict)
                or "count" not in value
            ):
                yield from counts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from counts_of(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def has(number: str, text: str) -> bool:
    return bool(re.search(rf"(?<![\d,.]){re.escape(number)}(?![\d,])", text))


@pytest.mark.parametrize("kind", ["stack-exchange", "shell-site", "hh-rlhf", "own"])
def test_no_text_becomes_markup(kind: str) -> None:
    text = render_card(evil_card() | {"kind": kind})
    tags = Tags(text)
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in tags.opened for name in attributes if name.startswith("on")]
    assert text.count("<title>") == 1 + len(re.findall(r"<rect[^>]*><title>", text)) + len(
        re.findall(r'<svg class="share"[^>]*><title>', text)
    )
    assert text.count("<style>") == text.count("</style>") == 1
    assert "{{ 7*7 }}" in tags.text
    assert text.count("&lt;script&gt;") >= 40


def test_only_web_addresses_become_links() -> None:
    found = {attributes["href"] for tag, attributes in Tags(render_card(evil_card())).opened if tag == "a"}
    assert all(re.match(r"https?://|#[a-z-]+$", str(address)) for address in found)
    links = {
        str(attributes["href"]) for tag, attributes in Tags(render_card(make_card())).opened if tag == "a"
    }
    assert {
        "https://a.org/q/71",
        "https://a.org/a/72",
        "https://a.org/a/73",
        "https://a.org/users/9",
    } <= links
    assert [
        build_link(bad, "x") for bad in ("javascript:name/1", "//a.org/1", "https://shell.example/q/1", "")
    ] == ["x"] * 4
    assert 'href="https://a.org/?a=&#34;&gt;"' in build_link('https://a.org/?a=">', "<b>")
    assert (
        link_author("https://a.org/users/9")
        == '<a href="https://a.org/users/9" target="_blank" rel="noreferrer">user 9</a>'
    )


def test_every_text_of_a_pair_names_its_source_author_and_licence() -> None:
    words = Tags(render_card(make_card())).words
    assert (
        "question by Ann, CC BY-SA 4.0 · chosen answer by user 9, CC BY-SA 3.0 · rejected answer by Bo,"
        " CC BY-SA 2.5"
    ) in words


def test_every_count_is_on_the_page() -> None:
    text = render_card(make_card())
    everything = Tags(text).text
    missing = [number for number in counts_of(make_card(examples=[])) if not has(f"{number:,}", everything)]
    assert missing == []
    for share in ("67.6", "63.3", "14.8", "44.7", "3.0", "52.7", "97.9"):
        assert has(share, everything), share


ROWS: dict[str, Any] = {
    "unread_columns": {"prompt_id": 9001, "messages": 8002},
    "added_columns": {"system": 4507},
    "opposed": {"'score_A' and 'score_B'": 61},
    "noticed": {"rows whose answers begin with the whole prompt, which is taken off them": 17},
    "test_files": {"data/test_prefs-00000-of-00001.parquet": 1999},
    "other_files": ["red-team-attempts/red_team_attempts.jsonl.gz"],
}


def test_how_rows_were_read_is_on_the_page_if_there_is_something_to_say() -> None:
    words = Tags(render_card(make_card(kind="own", **ROWS))).words
    for count in (9001, 8002, 4507, 61, 17, 1999):
        assert has(f"{count:,}", words), count
    assert "Columns that were not read" in words
    assert "prompt_id 9,001 89.9 % of 10,007 rows" in words
    assert "Files that were not read" in words
    assert "red-team-attempts/red_team_attempts.jsonl.gz" in words
    empty = {name: type(value)() for name, value in ROWS.items()}
    for text in (render_card(make_card()), render_card(make_card(**empty))):
        assert "How the rows were read" not in text
        assert "#columns" not in text


def test_names_of_columns_and_files_become_no_markup() -> None:
    evil = {name: {EVIL: 3} if isinstance(value, dict) else [EVIL] for name, value in ROWS.items()}
    tags = Tags(render_card(make_card(kind="own", **evil)))
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img"}
    assert tags.text.count(EVIL) >= len(ROWS)


def test_bands_follow_from_each_other() -> None:
    words = Tags(render_card(make_card())).words
    assert "10,007 rows read: 2,725 questions and 5,798 answers" in words
    assert "used 8,523 85.2 % left out by the rules 1,477 14.8 % cannot be used 7 < 0.1 %" in words
    assert "with answers to compare 1,437" in words
    assert "with nothing to compare 1,205" in words
    assert "of other splits, not used 1,748" in words
    assert "4,032 pairs, drawn from 9,001" in Tags(render_card(make_card(pairs_to_draw_from=9001))).words
    assert "drawn from" not in words + Tags(render_card(make_card(pairs_to_draw_from=4032))).words


def test_a_reason_is_a_share_of_what_it_counts() -> None:
    words = Tags(render_card(make_card())).words
    assert "post types other than question and answer 1,477 14.8 % of 10,007 rows" in words
    assert "questions without answers 83 3.0 % of 2,725 questions" in words
    assert "answers whose question is missing 2 < 0.1 % of 5,798 answers" in words
    assert "without two differently scored answers 494 44.7 % of 1,104 questions of the split" in words
    assert "rows that cannot be read 7 < 0.1 % of 10,007 rows" in words
    own = make_card(
        kind="own",
        read={"rows": 9000},
        rows_seen=9000,
        dropped={"comparisons that contradict each other": 8},
        quarantined={},
    )
    words = Tags(render_card(own)).words
    assert "comparisons that contradict each other 8 0.2 % of 4,040 comparisons" in words
    assert "9,000 rows read" in words
    assert "used 9,000 100.0 %" in words


@pytest.mark.parametrize("missing", [OPTIONAL, *[(name,) for name in OPTIONAL]])
@pytest.mark.parametrize("empty", [True, False])
def test_what_a_card_lacks_is_left_out(missing: tuple[str, ...], empty: bool) -> None:
    some = (
        make_card(**{name: type(CARD[name])() for name in missing})
        if empty
        else {n: v for n, v in make_card().items() if n not in missing}
    )
    text = render_card(some)
    assert ('id="rules"' in text) == ('href="#rules"' in text) == (not {"rules", "masked"} <= set(missing))
    assert ("max_pairs" in text) == ("rules" not in missing)
    assert ("e-mail addresses" in text) == ("masked" not in missing)
    assert ("Gap of a pair" in text) == ("gaps" not in missing)
    assert ("Answers a question has" in text) == ("answers_per_question" not in missing)


def test_no_pair_no_rule_of_thumb_no_licence() -> None:
    text = render_card(
        make_card(examples=[], older_wins=None, dropped={}, quarantined={}, licences={"": 8438})
    )
    assert 'id="pairs"' not in text
    assert 'href="#pairs"' not in text
    assert "The older answer" not in text
    assert "every row that was read is in use" in text
    assert "no licence named" in text


def zeros(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: zeros(item) for name, item in value.items()}
    if isinstance(value, list):
        return [zeros(item) for item in value]
    return value if isinstance(value, str | bool) or value is None else 0


@pytest.mark.parametrize("histogram", [True, False])
def test_a_card_of_zeros_is_a_page_too(histogram: bool) -> None:
    nothing = zeros(make_card(answer_chars=[], prompt_chars=[]))
    if not histogram:
        nothing |= {
            "scores": [],
            "gaps": [],
            "answers_per_question": [],
            "examples": [],
            "sites": {},
            "licences": {},
        }
    text = render_card(nothing)
    assert Tags(text).open == []
    assert not re.search(r"\b(nan|inf|None)\b", Tags(text).text)
    assert '="nan' not in text


def test_one_pair_is_not_pairs() -> None:
    rows = dict.fromkeys(CARD["rows"], 1)
    one = make_card(
        site="a.org",
        sites={"a.org": 1},
        kept={"questions": 1, "answers": 2, "pairs": 1},
        questions_with_pairs=1,
        rows=rows,
        longer_wins=1.0,
    )
    one |= {
        "scores": [{"score": 0, "count": 2}],
        "split_questions": {"finetune": 0, "reward": 1, "rl": 0, "evaluation": 0},
        "older_wins": 0.0,
    }
    words = Tags(
        render_card(
            one | {"read": {"questions": 1, "answers": 2}, "rows_seen": 3, "dropped": {}, "quarantined": {}}
        )
    ).words
    assert "1 pair of a better and a worse answer from a.org" in words
    assert "3 rows read: 1 question and 2 answers" in words
    assert "1 of 1 pair, drawn" in words
    assert not re.search(r"(?<![\d,])1 (pairs|questions|rows|answers)\b", words)


def test_a_rule_of_thumb_that_loses_is_turned_round() -> None:
    words = Tags(render_card(make_card(longer_wins=0.4, older_wins=None))).words
    assert re.search(r"Always naming the shorter answer is right for up to 60\.0\s% of these pairs", words)
    assert re.search(
        r"Always naming the longer answer is right for 67\.6\s% of these pairs",
        Tags(render_card(make_card())).words,
    )
    assert re.search(
        r"Always naming the older answer is right for 70\.0\s%",
        Tags(render_card(make_card(older_wins=0.7))).words,
    )


def test_offensive_samples_hide_behind_a_warning() -> None:
    tags = Tags(render_card(make_card(kind="hh-rlhf"))).opened
    places = [place for place, (tag, attributes) in enumerate(tags) if tag == "details"]
    assert [tags[place][1]["class"] for place in places] == ["shield", "pair"]
    assert not any("open" in tags[place][1] for place in places)
    assert "shield" not in [
        attributes.get("class") for _, attributes in Tags(render_card(make_card())).opened
    ]


def test_chosen_stands_before_rejected_as_the_markdown_it_is() -> None:
    text = render_card(make_card(examples=[PAIR | {"chosen": "a\n\n* <b>", "rejected": "c" * 5000}]))
    assert text.index("<pre>a\n\n* &lt;b&gt;</pre>") < text.index("<pre>ccc")
    assert "… (1,000 more characters)</pre>" in text
    assert clip_text("a" * 4000) == "a" * 4000


def test_rules_have_their_value_and_meaning_in_the_order_of_the_settings() -> None:
    text = render_card(make_card())
    found = re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd><dd>([^<]*)</dd>", text)
    names = [name for name, _, _ in found]
    assert names == sorted(names, key=lambda name: [*Data.model_fields, name].index(name))
    values = {name: value for name, value, _ in found}
    assert values.pop("max_questions_per_author") == "not set"
    assert values == {
        "max_pairs": "13",
        "rl_share": "0.1",
        "duplicates": "together",
        "languages": "empty",
        "unheard_of": "yes",
    }
    assert {name: meaning for name, _, meaning in found}["max_pairs"] == Data.model_fields[
        "max_pairs"
    ].description


def test_long_lists_are_folded_and_many_sites_counted() -> None:
    sites = {f"s{number}.org": 100 + number for number in range(40)}
    text = render_card(make_card(sites=sites, site=", ".join(sites)))
    words = Tags(text).words
    assert "from 40 sites" in words
    assert "30 more" in words
    assert all(f"<span>{name}</span><b>{count}</b>" in text for name, count in sites.items())
    assert text.index("s39.org</span>") < text.index("s0.org</span>")


def drawn(values: dict[float, int]) -> list[tuple[str, int]]:
    (histogram,) = draw_histograms(
        {"kind": "own", "scores": [{"score": value, "count": count} for value, count in values.items()]}
    )
    found = re.findall(r"<title>(.*?): ([\d,]+)</title>", histogram.drawing)
    return [(label, int(count.replace(",", ""))) for label, count in found if label]


def test_whole_numbers_stand_at_equal_steps() -> None:
    assert drawn({-1: 4, 2: 1500}) == [("−1", 4), ("0", 0), ("1", 0), ("2", 1500)]
    assert drawn({0.25: 3, 1.5: 2}) == [("0.25", 3), ("1.5", 2)]


@pytest.mark.parametrize(
    "values",
    [
        range(1000),
        [k / 7 for k in range(500)],
        [-1e308, 0, 1e308],
        [float("inf"), 1.5],
        [1e-320 * k + 0.5 for k in range(90)],
    ],
)
def test_many_values_share_columns_and_none_is_lost(values: Any) -> None:
    found = drawn(dict.fromkeys(values, 2))
    assert len(found) <= MOST_COLUMNS
    assert sum(count for _, count in found) == 2 * len(set(values))


def test_lengths_of_which_there_are_none_have_their_place() -> None:
    bins = [{"from": 512, "below": 1024, "count": 6}, {"from": 4096, "below": 8192, "count": 5}]
    (histogram,) = draw_histograms({"kind": "own", "answer_chars": bins})
    assert re.findall(r"<title>(\w+) characters and up: (\d+)<", histogram.drawing) == [
        ("512", "6"),
        ("1k", "0"),
        ("2k", "0"),
        ("4k", "5"),
    ]
    assert histogram.median == "512–1,023"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (1e-5, "< 0.1 %"),
        (0.5, "50.0 %"),
        (0.99999, "99.9 %"),
        (1, "100.0 %"),
        (1.25, "125.0 %"),
    ],
)
def test_a_little_is_never_nothing_and_nearly_all_is_never_all(share: float, text: str) -> None:
    assert format_share(share).replace("\xa0", " ") == text


def test_nothing_is_loaded_from_elsewhere() -> None:
    text = render_card(make_card())
    without_links = re.sub(r'<a href="[^"]*"', "<a", text)
    assert not re.search(r"https?:|url\(|@import|\bsrc=|<link|<script", without_links)
    assert "default-src 'none'" in text


def test_equal_cards_give_equal_pages() -> None:
    assert render_card(make_card()) == render_card(json.loads(json.dumps(make_card(), sort_keys=True)))


def test_the_template_and_its_style_are_packaged() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "tasks.reporting"
    ]
    assert all(any(Path(name).match(pattern) for pattern in shipped) for name in (TEMPLATE, STYLE))


@pytest.mark.parametrize("kind", ["stack-exchange", "hh-rlhf"])
@pytest.mark.parametrize("evil", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways_and_runs_and_fetches_nothing(
    browser: Any, tmp_path: Path, kind: str, evil: bool
) -> None:
    (tmp_path / "card.html").write_text(
        render_card((evil_card() if evil else make_card()) | {"kind": kind}), encoding="utf-8"
    )
    view = browser.new_page(viewport={"width": 380, "height": 800})
    asked: list[str] = []
    said: list[str] = []

    def tell(dialog: Any) -> None:
        said.append(dialog.message)
        dialog.dismiss()

    view.on("dialog", tell)
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    address = (tmp_path / "card.html").as_uri()
    view.goto(address)
    for opened in (False, True):
        view.evaluate(
            "opened => document.querySelectorAll('details').forEach(part => part.open = opened)", opened
        )
        wide = (
            "[...document.querySelectorAll('main *')].filter(part => !part.closest('svg') && "
            "part.scrollWidth > part.clientWidth + 1"
        )
        wide += " && getComputedStyle(part).display != 'inline').map(part => part.outerHTML.slice(0, 200))"
        assert view.evaluate(wide) == []
        assert view.evaluate("document.documentElement.scrollWidth") == 380
    view.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert asked == [address]
    assert said == []
    view.close()


def test_chosen_is_left_of_rejected_on_a_wide_screen_and_above_it_on_a_narrow_one(
    browser: Any, tmp_path: Path
) -> None:
    (tmp_path / "card.html").write_text(render_card(make_card()), encoding="utf-8")
    for width, beside in ((1200, True), (380, False)):
        view = browser.new_page(viewport={"width": width, "height": 800})
        view.goto((tmp_path / "card.html").as_uri())
        view.locator(".pair summary").click()
        chosen, rejected = (part.bounding_box() for part in view.locator(".answer").all())
        assert (chosen["y"] == rejected["y"] and chosen["x"] < rejected["x"]) == beside
        assert (chosen["x"] == rejected["x"] and chosen["y"] < rejected["y"]) == (not beside)
        view.close()


def test_paper_shows_the_samples_but_not_the_offensive_ones(browser: Any, tmp_path: Path) -> None:
    for kind, shown in (("stack-exchange", True), ("hh-rlhf", False)):
        (tmp_path / "card.html").write_text(render_card(make_card(kind=kind)), encoding="utf-8")
        view = browser.new_page()
        view.goto((tmp_path / "card.html").as_uri())
        view.emulate_media(media="print")
        assert (
            view.locator(".pair .answer").first.evaluate(
                "part => part.checkVisibility({contentVisibilityAuto: true})"
            )
            == shown
        )
        view.close()
