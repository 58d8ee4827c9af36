"""Personal data: what is found and what is not, one by one; everything else byte for byte, on made-up texts and on real posts."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.dataset.curation import personal_data
from tasks.dataset.curation.personal_data import KINDS, mask_personal_data
from tasks.dataset.sources.markdown import to_markdown
from tests.support.dumps import iter_posts
from tests.support.paths import SHARED

DUMPS = SHARED / "data" / "stackexchange"

# put together here, so that no scanner of repositories takes this file for a leak
LINE = "MIIEpAIBAAKCAQEA7Zq3fh0+x/9uW2vT" * 2
AMAZON, AMAZON_SECRET = "AKIA" + "IOSFODNN7EXAMPLE", "wJalrXUtnFEMI/" + "K7MDENG/bPxRfiCYEXAMPLEKEY"
LETTERS = "aB3dE6gH9" * 12
KEYS = {
    "amazon": AMAZON,
    "amazon, temporary": "ASIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "Sy-_7" * 7,
    "github": "ghp_" + LETTERS[:36],
    "github, of an installation": "ghs_" + LETTERS[:36],
    "github, fine-grained": f"github_pat_{LETTERS[:22]}_{LETTERS[:59]}",
    "slack": "xoxb-" + "123456789012-123456789012-" + LETTERS[:24],
    "stripe": "sk_live_" + LETTERS[:24],
    "stripe, restricted": "rk_live_" + LETTERS[:24],
    "openai, old": "sk-" + LETTERS[:48],
    "openai": f"sk-proj-{LETTERS[:20]}-_{LETTERS[:40]}",
    "anthropic": f"sk-ant-api03-{LETTERS[:50]}-_{LETTERS[:40]}",
    "hugging face": "hf_" + LETTERS[:34],
    "npm": "npm_" + LETTERS[:36],
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0." + "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1g",
    "jwt, unsigned": "eyJhbGciOiJub25lIn0K" + ".eyJzdWIiOiIxMjM0In0.",
    "rsa": f"-----BEGIN RSA PRIVATE KEY-----\n{LINE}\n{LINE}\nAbc=\n-----END RSA PRIVATE KEY-----",
    "encrypted": f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A\n\n{LINE}\n-----END RSA PRIVATE KEY-----",
    "pgp": f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v1\n\n{LINE}\n=aBc3\n-----END PGP PRIVATE KEY BLOCK-----",
    "of one line": f"-----BEGIN PRIVATE KEY-----\\n{LINE}\\n{LINE}\\n-----END PRIVATE KEY-----",
    "in code": f'-----BEGIN EC PRIVATE KEY-----\\n" +\n    "{LINE}\\n" +\n    "-----END EC PRIVATE KEY-----',
}
EMAILS = [
    "me@gmail.com",
    "Jane.Doe+news@mail.there-and-then.co.uk",
    "SJEI@GOL.COM",
    "müller@straße.de",
    "jo...@gmail.com",
    "a_b@x.info",
]
PHONES = [
    *(
        "+44 20 7946 0958",
        "+442079460958",
        "+33.1.23.45.67.89",
        "+1 (916) 654-1447",
        "+44 (0)1792 782 341",
        "+48-22/504-2000",
        "+998 (71) 1205278",
    ),
    *(
        "0044 20 7946 0958",
        "00 44 20 7946 0958",
        "0049-30-901820",
        "+44\N{NO-BREAK SPACE}20\N{NO-BREAK SPACE}7946\N{NO-BREAK SPACE}0958",
    ),
]
PHONES += [
    *(
        "(+44) (0)20 7946 0958",
        "(+44) 20 7946 0958",
        "(+44)20 7946 0958",
        "(+44 20) 7946 0958",
        "(0044) 20 7946 0958",
        "(00 44) (0)20 7946 0958",
    ),
    *(
        "(+1) 650-253-0000",
        "(+1)(650)253-0000",
        "(+1) (650) 253-0000",
        "(+49) (0) 30 901820",
        "(+49)30-901820",
        "(+33) (0)1.23.45.67.89",
    ),
    *(
        "(+33) 1 23 45 67 89",
        "(+39) 06 698 83712",
        "(+61) 2 9374 4000",
        "[+44] 20 7946 0958",
        "(+91)-22-6617-7500",
        "(+81) (0)3-6384-9000",
    ),
    *(
        "(+7) (495) 739-70-00",
        "(+86) 10 6552 9988",
        "(+55) (11) 2395-8400",
        "(+55 11) 2395-8400",
        "(+44-20) 7946 0958",
        "(+1-202) 555-0143",
        "(+353) (0)1 436 1000",
        "(+972) (0)3 123 4567",
    ),
    *(
        "(+44)-(0)20-7946-0958",
        "(+44)/20/79460958",
        "(+852) 2123 4567",
        "(+44) 020 7946 0958",
        "( +44 ) 20 7946 0958",
        "(+ 44) 20 7946 0958",
    ),
    *(
        "(+44)\N{NO-BREAK SPACE}(0)20\N{NO-BREAK SPACE}7946\N{NO-BREAK SPACE}0958",
        "(+44) (020) 7946 0958",
        "+44 (0) 20 7946 0958",
    ),
]
KEYED = [(secret, "key") for secret in KEYS.values()]
FINDINGS = [*((text, "email") for text in EMAILS), *((text, "phone") for text in PHONES), *KEYED]

AROUND = {  # texts around findings
    "Mail [me@gmail.com](mailto:me@gmail.com?cc=you@there.org).": "Mail [<email>](mailto:<email>?cc=<email>).",
    "_me@gmail.com_ **me@gmail.com** <me@gmail.com>": "_<email>_ **<email>** <<email>>",
    "Ask me@gmail.com.Thanks": "Ask <email>.Thanks",
    "邮箱me@gmail.com请,电话+442079460958,密钥"
    + KEYS["github"]
    + "。": "邮箱<email>请,电话<phone>,密钥<key>。",
    r'print("a\nme@gmail.com\n%s")': r'print("a\n<email>\n%s")',
    "https://there.org/new?to=me@gmail.com&x=1": "https://there.org/new?to=<email>&x=1",
    "[there](http://mailto:me@gmail.com) or http://me@gmail.com.": "[there](http://mailto:<email>) or http://<email>.",
    "(+44 20 7946 0958) tel:+442079460958": "(<phone>) tel:<phone>",
    "(+44 20 7946 0958) (call +44 (0)20 7946 0958)": "(<phone>) (call <phone>)",
    "[(+44) 20 7946 0958](tel:+442079460958), [+44 20 7946 0958](x)": "[<phone>](tel:<phone>), [<phone>](x)",
    "(see (+44) (0)20 7946 0958 or (+1) 650 253 0000)": "(see <phone> or <phone>)",
    "+44 20 7946 0958 / +1 650 253 0000": "<phone> / <phone>",
    "+999999999999 or +44 20 7946 0958": "+999999999999 or <phone>",
    "+44 20 7946 0958+1 650 253 0000": "<phone><phone>",  # the second is seen only once the first is gone
    f'id = "{AMAZON}"\naws_secret_access_key = "{AMAZON_SECRET}"': 'id = "<key>"\naws_secret_access_key = "<key>"',
    f"{AMAZON} x{KEYS['github']} task-{LETTERS[:48]} hf_{'load_' * 9}": f"<key> x{KEYS['github']} task-{LETTERS[:48]} hf_{'load_' * 9}",
    f"https://s3.amazonaws.com/a.pdf?AWSAccessKeyId={AMAZON}&Expires=1": "https://s3.amazonaws.com/a.pdf?AWSAccessKeyId=<key>&Expires=1",
    f"> -----BEGIN PRIVATE KEY-----\n> {LINE}\n> {LINE}\n\nIt begins so. Why?": "> <key>\n\nIt begins so. Why?",
}
NOTHING = r"""
git@github.com:org/repo.git | ssh -T git@github.com | ssh://git@github.com/org/repo | scp a me@there.org:/tmp/a | me@box.there.org:~$ ls
@app.route | @me | @me@mastodon.social | <%@ Page.name %> | @media.print | SET @S=@my.id | [@Eric](http://there.org)
me@example.com | Me@Sub.Example.ORG | me@there.example | root@localhost | me@there.test | abuse@yourdomain.com | me@192.168.0.1
logo@2x.png | row@main.id.v2 | react@16.7.0.js | sha@1a2b3c.txt | this@Main.name | x@layer.to(1) | pbmc@meta.data | '%s@gmail.com' | $user@gmail.com
https://medium.com/@me/a | https://medium.com/@a.name/b | https://www.flickr.com/photos/123@N00/4 | https://unpkg.com/vue@2.6.name/a
https://www.google.com/maps/@28.3522484,77.5313176,12.81z | https://there.org/dev@python.org/1 | https://me:word@there.org/x
https://me@bitbucket.org/me/a.git | http://maps.google.ru/maps?q=a%20@48.700888,44.52&z=7 | folding@home | Wireless@SG | me@ there.org
a+442079460958 | (a)+442079460958 | 1+442079460958 | +1.2345678901 | [+48.858222123, +2.29] | +0530 | 2017-01-01T00:00:00+00:00 | C++11
00442079460958 | 0012025550123 | 0x00 44 20 7946 0958 | 1.00 44 20 7946 0958 | 10:00 44 20 7946 0958 | 19 00 44 20 7946 0958 | +10000000000
1.0.0044 | 00000000-0044-2079-4609-580000000000 | 020 7946 0958 | 1 650 253 0000 | x+1 - 1234567890 | 2001 +1 | 00:44:20 | +999999999999
AKIA... | ghp_... | sk-fading-circle-and-then-some-more-x | task-management-of-all-the-things | hf_hub_download_of_a_very_long_name_of_a_function
"""
NONE = [text for line in NOTHING.strip().splitlines() for text in line.split(" | ")]
NONE += ["a" * 80 + "@there.org", "NAKIA" + "A" * 16, "eyJhbGciOiJIUzI1NiJ9"]
NONE += [
    start + LETTERS[:length]
    for start, length in (("AIza", 34), ("xoxb-", 34), ("sk_test_", 24), ("xghp_", 36), ("npm_", 35))
]
NONE += [
    "-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQ...\n-----END PRIVATE KEY-----",
    f"-----BEGIN CERTIFICATE-----\n{LINE}\n-----END CERTIFICATE-----",
]
NONE += [f"if '-----BEGIN PRIVATE KEY-----' in text: {LINE}"]


@pytest.mark.parametrize(("text", "kind"), FINDINGS, ids=[*EMAILS, *PHONES, *KEYS])
def test_each_kind_is_found(text: str, kind: str) -> None:
    assert kind in KINDS
    for before, after in (
        ("", ""),
        ("See ", "."),
        ('x = "', '"'),
        ("a\n\n```\n", "\n```\nb"),
        ("(", ")"),
        ("`", "`, 7 and 00 @ + -"),
    ):
        assert mask_personal_data(before + text + after) == (f"{before}<{kind}>{after}", Counter({kind: 1}))


@pytest.mark.parametrize("text", AROUND)
def test_only_the_finding_is_replaced(text: str) -> None:
    result, found = mask_personal_data(text)
    assert result == AROUND[text]
    assert found == Counter(re.findall("<(email|phone|key)>", result))
    assert mask_personal_data(result) == (result, Counter())


@pytest.mark.parametrize("text", NONE)
def test_what_is_none_stays(text: str) -> None:
    for whole in (text, f"See {text}, and {text}."):
        result, found = mask_personal_data(whole)
        assert result is whole
        assert found == Counter()


def test_what_is_in_a_number_is_no_number_of_its_own() -> None:
    """No number of today has a second lead inside; a pattern that finds one shows what would happen."""
    assert personal_data._mask_phones("+49 30 1 650 253 0000!", re.compile(r"\+|0"), Counter()) == "<phone>!"


PROSE = st.text(st.sampled_from("ab Zé中.,:!?*#<>[]'\"`\\\n"), max_size=20)
SEPARATED = st.lists(st.tuples(PROSE, st.sampled_from(FINDINGS)), max_size=4)


@given(SEPARATED, PROSE)
def test_around_findings_every_byte_stays(parts: list[tuple[str, tuple[str, str]]], last: str) -> None:
    text = "".join(f"{prose}\n\n{secret}\n\n" for prose, (secret, _) in parts) + last
    expected = "".join(f"{prose}\n\n<{kind}>\n\n" for prose, (_, kind) in parts) + last
    assert mask_personal_data(text) == (expected, Counter(kind for _, (_, kind) in parts))


BITS = [
    *(text for text, _ in FINDINGS),
    *NONE,
    LINE,
    AMAZON_SECRET,
    "secret=",
    "://",
    "@",
    ".com",
    "+",
    "00",
    "44",
    " ",
    "\n",
    "=",
    "-----",
    "<key>",
    "_",
    "me",
]


@given(
    st.one_of(
        st.lists(st.sampled_from(BITS), max_size=8).map("".join),
        st.text("a1024 +@./:=-_()com\n", max_size=60),
    )
)
def test_masking_again_changes_nothing_and_only_findings_change(text: str) -> None:
    result, found = mask_personal_data(text)
    assert mask_personal_data(result) == (result, Counter())
    assert (result is text) == (not found)
    assert all(result.count(f"<{kind}>") >= found[kind] - text.count(f"<{kind}>") for kind in KINDS)
    kept = re.split("<(?:email|phone|key)>", result)
    assert re.fullmatch("(?:.+?)".join(map(re.escape, kept)), text, re.DOTALL)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a@" * 50_000,
            "x@a." * 50_000,
            "a." * 50_000 + "@",
            "://a" + "=a." * 50_000 + "@",
            "+44 20 " * 20_000,
            "00 1 " * 20_000,
        ),
        *(
            "-----BEGIN PRIVATE KEY-----" * 5_000,
            ("-----BEGIN PRIVATE KEY-----" + "\\n" * 99) * 500,
            ".eyJ" + "eyJ-" * 50_000,
            "sk-ant-" * 50_000,
        ),
        *(
            "me@" + "a" * 50_000 + " x@y.org",
            "-----BEGIN PRIVATE KEY-----" + "\\" * 50_000,
            "-----BEGIN PRIVATE KEY-----" + "A" * 50_000,
        ),
        *(AMAZON + ("secret" + " " * 20) * 5_000, AMAZON + "xoxb-" + "1-" * 50_000),
    ],
    ids=lambda text: text[:12],
)
def test_no_text_takes_long(text: str) -> None:
    """Milliseconds; patterns that go back over what they have read would take hours."""
    mask_personal_data(text)


REAL = {
    "travel/Posts.csv.gz": Counter(phone=37, email=18),
    "ai/Posts.xml": Counter(key=2),
    "stackoverflow-2008/Posts.xml": Counter(email=2),
}


@pytest.mark.skipif(not DUMPS.is_dir(), reason="the real data of shared/data is not on this machine")
@pytest.mark.parametrize("name", REAL)
def test_real_posts(name: str) -> None:
    """Each of these findings has been looked at; the libraries' lists of numbers and domains change slowly."""
    counted: Counter[str] = Counter()
    for post in iter_posts(DUMPS / name):
        text = to_markdown(post.body)
        result, found = mask_personal_data(text)
        counted += found
        assert (result is text) == (not found)
        assert mask_personal_data(result) == (result, Counter())
    assert counted == REAL[name]
