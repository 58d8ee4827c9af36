"""Provide chat templates that write the date, and set transformers' clock."""

import datetime

import pytest
from transformers.utils import chat_template_utils

from tests.support.chat_families import LLAMA3

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
# As the families write it; the last two lines of each are the same.
DATED = {
    "Llama 3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        "{%- endif %}{%- endif %}{{ 'Today Date: ' + date_string + '\\n' }}" + LLAMA3
    ),
    "SmolLM3": '\n {%- set today = strftime_now("%d %B %Y") -%}\n{{ "Today Date: " ~ today }}' + TURNS,
    "gpt-oss": (
        "{%- macro system() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' }}{%- endmacro -%}\n"
        "{{ system() }}" + TURNS
    ),
    "a variable": "\n  {% set form = '%-d.%-m.%y %A' %}{{ strftime_now(form) }}\n" + TURNS,
}


def set_day(patch: pytest.MonkeyPatch, day: datetime.datetime) -> None:
    """Let it be another day for the chat templates."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(day.year, day.month, day.day, tzinfo=tz)

    patch.setattr(chat_template_utils, "datetime", Clock)
