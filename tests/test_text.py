"""Text from files as data."""

from __future__ import annotations

import ast
import doctest
import random

import pytest

from transformers_quip import text
from transformers_quip.text import duration, markdown, one_line, printable, python, size


def test_examples():
    assert doctest.testmod(text).attempted >= 4
    assert doctest.testmod(text).failed == 0


def test_printable():
    assert printable("a\nb\tc") == "a\nb\tc"
    assert printable("\x1b[31m\x9b\u202e\u2028\ud800\x7f") == "\\x1b[31m\\x9b\\u202e\\u2028\\ud800\\x7f"
    assert printable("Grüße, 世界, \U0001f468\u200d\U0001f469") == "Grüße, 世界, \U0001f468\u200d\U0001f469"
    assert printable(5) == "5"


def test_one_line():
    assert one_line("a\nb\r\n") == "a\\nb\\r\\n"
    assert one_line("x" * 3000) == "x" * 2000 + "…"
    assert one_line("x" * 2000) == "x" * 2000


def test_python_gives_the_value_back():
    random_ = random.Random(0)
    for _ in range(500):
        value = "".join(chr(random_.choice([random_.randrange(128), random_.randrange(0x110000)])) for _ in range(20))
        literal = python(value)
        assert ast.literal_eval(literal) == value
        assert literal.isprintable()


def test_markdown():
    assert markdown("tiny-llama, 2 bits (e8p)") == "tiny-llama, 2 bits (e8p)"
    assert markdown("<b>&amp; | `c` *d* _e_ ~f~ $g$ \\") == (
        "&lt;b&gt;&amp;amp; \\| \\`c\\` \\*d\\* \\_e\\_ \\~f\\~ \\$g\\$ \\\\"
    )


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (99.4, "99 s"), (119, "2 min"), (99 * 60, "99 min"), (100 * 60, "1 h 40 min"), (359_999, "100 h 0 min")],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 B"), (1500, "1.50 kB"), (2.5e9, "2.50 GB"), (3e12, "3.00 TB"), (1e30, "more than a million TB")],
)
def test_size(count, shown):
    assert size(count) == shown
