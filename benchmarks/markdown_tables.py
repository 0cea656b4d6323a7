"""What the tables of README.md and docs/results.md are made of: files of results, numbers, rows in Markdown."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
# Perplexities beyond this say only that the model is destroyed.
DESTROYED = 1e5


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def number(value: float) -> str:
    """A perplexity with a sensible number of digits."""
    if value > DESTROYED:
        return ">10^5"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def figure(values: list[float]) -> str:
    """One perplexity, or the mean with the range of several."""
    mean = number(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} to {number(max(values))})"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Markdown; empty without rows."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if rows else ""


def machine_line(content: dict) -> str:
    """Where the figures come from; a file of several machines names the processor of each row, in the order of the rows."""
    found = content["machine"]
    processors = list(dict.fromkeys(row.get("processor", found["processor"]) for row in content.get("rows", ())))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = " and ".join(processors or [found["processor"]])
    return f"\nMeasured on: {where}, {found['cores']} cores; Python {found['python']}, {versions}.\n"
