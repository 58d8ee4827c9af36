"""Mask personal data in Markdown: e-mail addresses, telephone numbers and secret keys.

Called by rules.py. Ouyang et al. 2022, A.1. In prose, links and code alike. phonenumbers decides which
numbers can exist, publicsuffixlist which domains. The kinds of keys are listed here: detect-secrets reports
whether a line has a secret, not where it ends (of a private key it finds the first line, of a JWT not the
signature), and lacks half of the kinds below.
"""

import re
from collections import Counter
from functools import cache

from phonenumbers import Leniency, PhoneNumberMatcher
from publicsuffixlist import PublicSuffixList

KINDS = ("email", "phone", "key")

LETTER = "A-Za-z0-9À-ÖØ-öø-ɏ"
# the n of "\nme@there.org" is not part of the address; %s@there.org and $user@there.org are formats, and
# @me@there.org is a name on Mastodon
START = rf"(?:(?<![{LETTER}%$@])(?!(?<=\\)[nrt])|(?<=\\[nrt]))"
DOMAIN = rf"(?:[{LETTER}-]+\.)+(?:[a-z]{{2,24}}|[A-Z]{{2,24}})"
# no match before a longer word, a call, a slot of R or a path on another machine (git@github.com:org/repo,
# me@host.org:~$)
END = rf"(?!_?[{LETTER}]|[@($\[]|\.[a-z0-9]|:[\w.:-]*[/~]|::)"
ADDRESS = rf"[{LETTER}][{LETTER}._+-]{{0,63}}@{DOMAIN}{END}"
# a link is not changed whatever @ it has (medium.com/@me, user@host, lists/dev@there.org), unless all of it
# or a value in it is an address
LINK = rf"://(?!(?:mailto:)?{ADDRESS}(?![/:?#]))(?:[^\s<>\"'()\[\]=]|=(?!{ADDRESS}(?![/:])))*"
EMAIL = re.compile(rf"{LINK}|{START}(?P<local>[{LETTER}][{LETTER}._+-]{{0,63}})@(?P<domain>{DOMAIN}){END}")
# addresses of no person: RFC 2606, placeholders for the reader's own, and a slot of R's Seurat; .test,
# .invalid, .local and localhost are not in the public list
EXAMPLE_DOMAIN = re.compile(
    r"(?:^|\.)(?:example\.(?:com|org|net|edu)|(?:your|my)-?(?:domain|company|site|server|host|email)\.\w+|meta\.data)$"
)
# users of repositories; labels of Kotlin
NOT_A_MAILBOX = frozenset("git hg this super return break continue".split())

DIGITS = r"(?=(?:[^\S\n]?[().\-/\[\]‐-―]{0,3}[^\S\n]?[(\[]?\d){7})"
PLUS = re.compile(
    rf"\+(?<![A-Za-z0-9_)\]+]\+)(?!\d{{1,3}}\.\d+(?![.-]?\d)){DIGITS}"
)  # neither a sum nor a decimal
ZEROS = re.compile(
    rf"00(?=[^\S\n]?[-(]?[1-9])(?<![A-Za-z0-9_.,:;/=+#$%&-]00)(?<!\d[^\S\n]00){DIGITS}"
)  # the cheapest condition first
# brackets around the country, or country and town: (+44) (0)20 7946 0958, (+55 11) 2395-8400
BRACKET = re.compile(r"[(\[][^\S\n]?\Z")
CLOSING = re.compile(r"[^\S\n]?\d(?:(?:[^\S\n]|[.-])?\d){0,6}[^\S\n]?(?P<bracket>[)\]])")
LONGEST = 48  # characters of a number with all its punctuation and an extension

# Quick tests, one search each: re finds a fixed first character ten times faster than one of several.
AT = re.compile(rf"@(?<=[{LETTER}._+-]@)[{LETTER}-]+\.")
CAPITAL = re.compile(r"A(?:KIA|SIA|Iza)[\w-]{16}")
DASH = re.compile(r"-(?:(?<=\bsk-|x[abeoprs]-)[\w-]{16}|----BEGIN )", re.ASCII)
LOW_LINE = re.compile(
    r"_(?=[A-Za-z0-9]{20})(?:(?<=\bgh[oprsu]_)|(?<=\bgithub_pat_)|(?<=\bhf_)|(?<=\bnpm_)|(?<=\b[rs]k_live_))",
    re.ASCII,
)
JWT = ".eyJ"

# BEGIN alone, or with a few letters of an example, is no leak: a line of the key must follow. Without END the
# key ends with the last such line.
LINES = r"(?:[\s\"'+>,\\]|\\[nr]|[A-Z][\w-]*: [^\n]*\n)*[\w+/]{40}"
BEGIN = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
REST = r"(?:(?:(?!-----).)*-----END [A-Z0-9 ]*-----|(?:(?:[\s\"'+>]|\\[nr])*[\w+/=]{20,})*)"
BLOCK = BEGIN + LINES + REST
BESIDE_AMAZON_ID = (
    r"(?P<kept>(?i:secret)[\w .-]{0,20}[\"']?\s*[:=,>(]{1,2}\s*[\"']?)[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=])"
)
KEYS = (
    rf"(?s:{BLOCK})",  # RSA, EC, DSA, OpenSSH, PGP
    r"(?<![A-Za-z0-9+/])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9+=])",  # Amazon's id
    BESIDE_AMAZON_ID,  # the secret
    r"(?<![A-Za-z0-9])AIza[\w-]{35}(?![\w-])",  # Google
    r"\bgh[oprsu]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{36,}",  # GitHub
    r"\bxox[abeoprs]-(?:\d+-)+[\w-]{10,}",  # Slack
    r"\b[rs]k_live_[A-Za-z0-9]{20,}",  # Stripe
    # OpenAI, OpenRouter, Anthropic
    r"(?<![\w-])sk-(?:[A-Za-z0-9]{32,}\b|(?:proj|svcacct|admin|or-v1|ant-\w+)-[\w-]{32,})",
    r"\bhf_[A-Za-z0-9]{34,}\b|\bnpm_[A-Za-z0-9]{36}\b",  # Hugging Face, npm
    r"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*",  # JSON web tokens
)
KEY = re.compile("|".join(KEYS), re.ASCII)


def mask_personal_data(text: str) -> tuple[str, Counter[str]]:
    """Return the text with <email>, <phone> or <key> in place of each finding, and counts by kind.

    The same object is returned if nothing is found. Masking a masked text changes nothing. What belongs to no
    person is kept: example.com, repositories (git@github.com:org/repo), decorators.
    """
    counts: Counter[str] = Counter()
    # repeated until nothing is found: a finding may have been hidden by the text right before it
    while (after := _mask_once(text, counts)) != text:
        text = after
    return text, counts


def _mask_once(text: str, counts: Counter[str]) -> str:
    if (
        CAPITAL.search(text)
        or DASH.search(text)
        or ("_" in text and LOW_LINE.search(text))
        or ("J" in text and JWT in text)
    ):
        text, count = KEY.subn(r"\g<kept><key>", text)
        if count:
            counts["key"] += count
    if "@" in text and AT.search(text):
        text = _mask_emails(text, counts)
    if "+" in text and PLUS.search(text):
        text = _mask_phones(text, PLUS, counts)
    if "0" in text and ZEROS.search(text):
        text = _mask_phones(text, ZEROS, counts)
    return text


def _mask_emails(text: str, counts: Counter[str]) -> str:
    def replacement(match: re.Match[str]) -> str:
        if (
            match["local"] is None
            or match["local"] in NOT_A_MAILBOX
            or not _is_deliverable(match["domain"].lower())
        ):
            return match[0]
        counts["email"] += 1
        return "<email>"

    return EMAIL.sub(replacement, text)


def _is_deliverable(domain: str) -> bool:
    """Return whether mail to this domain could reach a person: logo@2x.png in code is no address."""
    return not EXAMPLE_DOMAIN.search(domain) and _public_suffixes().publicsuffix(domain) is not None


@cache
def _public_suffixes() -> PublicSuffixList:
    return PublicSuffixList(accept_unknown=False, only_icann=True)


def _mask_phones(text: str, lead: re.Pattern[str], counts: Counter[str]) -> str:
    parts, done = [], 0
    for match in lead.finditer(text):
        if match.start() >= done and (number := _find_phone_number(text, match)):
            start, end = number
            parts += [text[done:start], "<phone>"]
            done = end
            counts["phone"] += 1
    return "".join([*parts, text[done:]])


def _find_phone_number(text: str, lead: re.Match[str]) -> tuple[int, int] | None:
    """Return the start and end of the telephone number that begins at this match, or None.

    After 00 digits must be in groups: 0012025550123 may as well be an id.
    """
    start, rest = lead.start(), text[lead.end() : lead.end() + LONGEST]
    opened = BRACKET.search(text, max(0, start - 2), start)
    closing = CLOSING.match(rest) if opened else None
    if opened and closing:  # phonenumbers finds no number that begins in brackets
        start, rest = opened.start(), f"{rest[: closing.start('bracket')]} {rest[closing.end() :]}"
    number = next(iter(PhoneNumberMatcher("+" + rest, None, Leniency.VALID)), None)
    if number is None or number.start or (lead[0] == "00" and number.raw_string[1:].isdigit()):
        return None
    end = lead.end() + number.end - 1
    if closing and number.end - 1 <= closing.start("bracket"):  # all of the number is in the brackets
        start = lead.start()
    return start, end
