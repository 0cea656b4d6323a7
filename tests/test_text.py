"""Text from files as data."""

from __future__ import annotations

import ast
import doctest
import random

from transformers_quip import text
from transformers_quip.text import markdown, one_line, printable, python


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
