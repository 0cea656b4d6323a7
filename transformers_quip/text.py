"""Show text from files safely: it is data, and must not control a terminal or a page.

A config.json, the name of a file or the words of a model can hold anything: escape sequences that a terminal obeys, marks
that turn the direction of writing, line breaks, half of a surrogate pair. A card of a model and a table on a terminal show
them as escapes such as `\\x1b`.
"""

from __future__ import annotations

import re
import unicodedata

# Control characters, marks without a picture (among them those that turn the direction), halves of surrogate pairs, and
# the line breaks of Unicode.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # they are part of words and of emoji
# Characters with a meaning in Markdown, its tables or HTML.
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def printable(text: object, keep: str = "\n\t") -> str:
    r"""The text with everything that is not seen written as an escape, but for the characters in `keep`.

    >>> printable("red \x1b[31m")
    'red \\x1b[31m'
    """
    return "".join(_shown(character, keep) for character in str(text))


def one_line(text: object, most: int = 2000) -> str:
    r"""As [`printable`], line breaks too; longer text than `most` characters is cut and ends in "…".

    >>> one_line("two\nlines")
    'two\\nlines'
    """
    shown = printable(str(text)[: most + 1], keep="")
    return shown if len(shown) <= most else shown[:most] + "…"


def markdown(text: object) -> str:
    r"""One line of Markdown (also in a table, also inside HTML) that shows just this text.

    >>> markdown("a|b <i> [x](y)")
    'a\\|b &lt;i&gt; \\[x\\](y)'
    """
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line)


def python(value: str) -> str:
    r"""The literal of Python, in double quotes, on one line.

    >>> python('x"); import os  #')
    '"x\\"); import os  #"'
    """
    return '"' + "".join(_literal(character) for character in value) + '"'


def _shown(character: str, keep: str) -> str:
    if character in keep or character in _JOINERS or unicodedata.category(character) not in _HIDDEN:
        return character
    return _escape(character)


def _literal(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    return character if character.isprintable() else _escape(character)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def size(count: int | float) -> str:
    """Bytes in a readable form: kB, MB, GB, with powers of ten."""
    if count > 1e18:
        return "more than a million TB"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds in a readable form: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
