"""Languages of texts: paragraphs written for this, what is no language, and posts of a real English site."""

import subprocess
import sys
import time
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset.curation.language import CLASSIFIED_CHARS, NOT_LANGUAGE, SEARCHED_CHARS, detect_language
from tests.support.dumps import build_questions, iter_posts
from tests.support.paths import ROOT, SHARED

DATA = SHARED / "data"
PARAGRAPHS = {
    "en": "How do I sort a list of objects by one of their attributes without writing a comparison function of my own? I have tried what the "
    "manual suggests, but the order comes out wrong as soon as two of them are equal.",
    "de": "Wie sortiere ich eine Liste von Objekten nach einem ihrer Attribute, ohne selbst eine Vergleichsfunktion zu schreiben? Ich habe "
    "versucht, was im Handbuch steht, aber die Reihenfolge stimmt nicht, sobald zwei davon gleich sind.",
    "fr": "Comment trier une liste d'objets selon l'un de leurs attributs sans écrire moi-même une fonction de comparaison ? J'ai essayé ce que "
    "propose le manuel, mais l'ordre est faux dès que deux d'entre eux sont égaux.",
    "es": "¿Cómo ordeno una lista de objetos por uno de sus atributos sin escribir yo mismo una función de comparación? He probado lo que dice "
    "el manual, pero el orden sale mal en cuanto dos de ellos son iguales.",
    "pt": "Como faço para ordenar uma lista de objetos por um dos seus atributos sem escrever eu mesmo uma função de comparação? Tentei o que o "
    "manual sugere, mas a ordem sai errada assim que dois deles são iguais.",
    "it": "Come posso ordinare un elenco di oggetti secondo uno dei loro attributi senza scrivere io stesso una funzione di confronto? Ho provato "
    "quello che suggerisce il manuale, ma l'ordine è sbagliato non appena due di essi sono uguali.",
    "nl": "Hoe sorteer ik een lijst met objecten op een van hun eigenschappen zonder zelf een vergelijkingsfunctie te schrijven? Ik heb geprobeerd "
    "wat de handleiding voorstelt, maar de volgorde klopt niet meer zodra er twee gelijk zijn.",
    "ru": "Как отсортировать список объектов по одному из их свойств, не создавая собственной функции сравнения? Я пробовал то, что советует "
    "руководство, но порядок получается неверным, как только два из них равны.",
    "ar": "كيف أرتب قائمة من الكائنات حسب إحدى خصائصها دون أن أكتب دالة مقارنة بنفسي؟ لقد جربت ما يقترحه الدليل، لكن الترتيب يصبح خاطئا عندما "
    "يتساوى اثنان منها.",
    "ja": "比較関数を自分で書かずに、オブジェクトのリストをその属性の一つで並べ替えるにはどうすればよいですか。マニュアルの方法を試しましたが、"
    "二つが等しいと順序がおかしくなります。",
    "zh": "如何按照对象的某个属性对列表进行排序，而不用自己编写比较函数？我试过手册里建议的方法，但是只要有两个对象相等，顺序就不对了。",
}
CODE = "def first(the_list, key):\n    return min((one for one in the_list if one is not None), key=key)\n"
URL = (
    "https://example.org/questions/what-is-the-best-way-to-sort-a-list-of-objects-by-one-of-their-attributes"
)
PATH = URL.removeprefix("https://")
NOTHING = [
    *(
        "",
        " \n",
        "?",
        "\x00",
        "\ud800",
        "42",
        "1234 5678 91011 1213",
        "x^2 + y^2 = z^2",
        "deadbeef cafebabe 00ff00ff a1b2c3d4",
        URL,
    ),
    *(f"[1]({PATH})", "Hello!", "Tortoise SVN with Ankhsvn", "Windows 10 NVIDIA GTX 1080 Ti i7-8700K"),
    *(
        f"```\n{CODE}",
        f"- ```\n  {CODE}",
        f"```{PARAGRAPHS['en']}```",
        f"`{PARAGRAPHS['en']}`",
        f"<{PARAGRAPHS['en']}>",
        f"![{PARAGRAPHS['en']}]({URL})",
    ),
]


@pytest.mark.parametrize("language", PARAGRAPHS)
def test_a_paragraph_is_told_also_with_much_code_and_many_addresses_before_it(language: str) -> None:
    text = PARAGRAPHS[language]
    assert detect_language(text) == language
    assert detect_language(f"```python\n{CODE * 5}```\n\n`{CODE.splitlines()[0] * 5}`\n\n{text}") == language
    assert (
        detect_language(
            f"![enter image description here]({URL})\n<{URL}>\n{URL} [1]({URL}) [2]({PATH}) {text}"
        )
        == language
    )
    assert detect_language(f"1. ~~~~\n   {CODE}   ```\n   ~~~~\n\n> {text}") == language


@pytest.mark.parametrize("language", PARAGRAPHS)
def test_the_first_sentence_is_enough(language: str) -> None:
    first = (
        PARAGRAPHS[language]
        .replace("。", ".")
        .replace("？", ".")
        .replace("؟", ".")
        .replace("?", ".")
        .split(".")[0]
    )
    assert detect_language(first) == language


@pytest.mark.parametrize("text", NOTHING)
def test_too_little_language_is_left_open(text: str) -> None:
    assert detect_language(text) == ""


def test_what_is_no_code_is_looked_at() -> None:
    """A lone backtick, a fence's info string, text after a fence has ended, a line that begins with inline code."""
    german = PARAGRAPHS["de"]
    for text in (
        f"Das ` ist: {german}",
        f"```sql\nSELECT\n```\n{german}",
        f"```x``` {german}",
        f"~~~\n{CODE}\n~~~~~\n{german}",
        f"[{german}]({URL})",
    ):
        assert detect_language(text) == "de", text


def test_only_the_beginning_is_looked_at() -> None:
    assert (CLASSIFIED_CHARS, SEARCHED_CHARS) == (300, 4000)
    assert detect_language(PARAGRAPHS["de"] * 2 + PARAGRAPHS["ru"] * 9) == "de"
    assert [detect_language(f"~~~\n{'x' * length}\n~~~\n{PARAGRAPHS['en']}") for length in (3000, 4000)] == [
        "en",
        "",
    ]


@pytest.mark.parametrize(
    "text",
    ["'Easiest' Place to get a Mongolian Visa?", "How to get to Telavi from Tbilisi by public transport?"],
)
def test_short_english_is_not_taken_for_pidgin(text: str) -> None:
    assert detect_language(text) == "en"


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_text_gets_a_code_of_two_letters_or_none(text: str) -> None:
    found = detect_language(text)
    assert found == "" or (len(found) == 2 and found.isascii() and found.islower())
    assert found == detect_language(f"\n\n{text}\n")


@given(
    st.sampled_from(sorted(PARAGRAPHS)),
    st.lists(st.sampled_from([f"```\n{CODE}```", URL, f"`{CODE.strip()[:20]}`", f"![x]({URL})"])),
)
def test_what_is_no_language_changes_nothing(language: str, parts: list[str]) -> None:
    around = "\n\n".join(parts[:6])
    assert detect_language(f"{around}\n\n{PARAGRAPHS[language]}\n\n{around}") == language


@pytest.mark.parametrize(
    "part",
    [
        "`",
        "```\n",
        "``` ",
        "](",
        "<",
        "![",
        "http://",
        "> ",
        "\n",
        "\t",
        "~~~~\n",
        "`a",
        "[a](",
        "`` `",
        "<a ",
    ],
)
def test_no_text_takes_long(part: str) -> None:
    text = (part * SEARCHED_CHARS)[:SEARCHED_CHARS]
    start = time.perf_counter()
    NOT_LANGUAGE.sub(" ", text)
    NOT_LANGUAGE.sub(" ", text[: SEARCHED_CHARS // 2] + "a" * (SEARCHED_CHARS // 2))
    assert time.perf_counter() - start < 0.5  # 1 ms, unless the pattern goes back and forth


def test_the_library_is_loaded_when_it_is_asked_for() -> None:
    code = "import sys; from tasks.dataset.curation.language import language_of; assert 'py3langid' not in sys.modules; print(language_of('Was ist denn das hier?'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("de\n", "")


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data of shared/data is not on this machine")
@pytest.mark.parametrize("name", ["travel/Posts.csv.gz", "ai/Posts.xml", "stackoverflow-2008/Posts.xml"])
def test_posts_of_an_english_site_are_english(name: str) -> None:
    posts = iter_posts(DATA / "stackexchange" / name)
    questions = build_questions(islice(posts, 1000), Counter(), site="s")
    texts = [
        text
        for question in questions
        for text in (question.prompt, *(answer.text for answer in question.answers))
    ]
    found = Counter(map(detect_language, texts))
    assert len(texts) > 500
    assert found["en"] >= 0.99 * len(texts)
    assert found["en"] + found[""] == len(texts)
