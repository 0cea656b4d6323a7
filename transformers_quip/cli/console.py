"""The output of the commands: results to stdout, for people or as JSON, and everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from ..text import one_line, printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
token_option = click.option("--token", help="Access token for the Hub.  [default: HF_TOKEN, or the one of `hf auth login`]")
revision_option = click.option("--revision", help="Branch, tag or commit on the Hub.")


def complain(message: str) -> None:
    """An error, in red where there is a terminal."""
    click.echo(click.style("error: ", fg="red", bold=True) + printable(message), err=True)


def tell(message: str) -> None:
    """A message to the user on stderr."""
    click.echo(printable(message), err=True)


def show(message: str) -> None:
    """A one-line result on stdout."""
    click.echo(printable(message))


def show_json(content: Mapping[str, Any]) -> None:
    """One JSON object; numbers that JSON does not have become null."""
    # JSON may hold characters that a terminal would obey (one-character escape sequences) or hide.
    text = json.dumps(_finite(content), indent=2, ensure_ascii=False)
    click.echo("".join(c if c == "\n" or c.isprintable() else json.dumps(c)[1:-1] for c in text))


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table; all columns but the first are aligned to the right. Markup in its text is shown, not interpreted."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(one_line(title)), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    # Wide enough to be piped into a file without folding.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
