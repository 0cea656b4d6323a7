"""The register of mutations, and what all of them share.

A mutation is a function (folder, random) → what it changed, in a few words, or None where the folder has nothing for it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], "str | None"]
MUTATIONS: dict[str, tuple[Mutation, int]] = {}
# The files that describe the quantization; mutations of the others are of another kind.
DESCRIPTIONS = ("config.json", "quantization_config.json")

# Values of every kind that JSON has, and strings that code could take for a path, a pattern, a number or a command.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 16, 255, 2**31, 2**32, 2**63 - 1, 2**63, 10**400, -(10**400), 0.5, 2.5, -0.0,
    1e308,
    5e-324, float("nan"), float("inf"), -float("inf"), "", " ", "x", "2", "none", "stored", "../../etc/passwd",
    "/etc/passwd",
    "(a+)+$", "[", "*", "\0", "\ud800", "x" * 5000, "9" * 5000, "\x1b]0;t\x07[red]<b>|`", [], {}, [[]], [None], [1, 2],
    ["a"], [2**70, -1],
    {"": {}}, {"*": None}, {"*": {"bits": 2}}, {"a": {"b": {"c": []}}}, json.loads("[" * 90 + "]" * 90),
    "e8p", "e8p-rvq4", "d4", "scalar8", "half-integer", "kronecker", "hadamard", "E8P12", "E8P12RVQ4B", "float16",
    "trellis:1mad:k2:rows", "trellis:hyb-q9v2:k2:qtip", "trellis:lut-q16v1:k8:rows", "trellis:mcg:k9:exl3",
    "trellis:1mad:k999999999:rows",
    "trellis:::",
)  # fmt: skip


def mutation(weight: int = 1) -> Callable[[Mutation], Mutation]:
    """Register a mutation that is chosen `weight` times as often as one of weight 1."""

    def register(function: Mutation) -> Mutation:
        MUTATIONS[function.__name__] = (function, weight)
        return function

    return register


def mutate(folder: Path, rng: random.Random, only: str | None = None) -> tuple[str, str]:
    """Change a folder once; in one case of five, its description and its weights.

    Returns:
        The names of the mutations, and what they changed.
    """
    names = [name for name in MUTATIONS if only is None or name == only]
    done: list[tuple[str, str]] = []
    wanted = 2 if rng.random() < 0.2 else 1
    for _ in range(200):
        if done:
            names = [name for name in MUTATIONS if name.startswith("config") != done[0][0].startswith("config")]
        name = rng.choices(names, [MUTATIONS[name][1] for name in names])[0]
        try:
            what = MUTATIONS[name][0](folder, rng)
        except (ValueError, KeyError, OSError, LookupError, TypeError, AttributeError):
            if not done:
                raise
            what = None  # the first one has left nothing that the second could read
        if what is not None:
            done.append((name, what))
        if len(done) == wanted:
            break
    if not done:
        raise LookupError(f"no mutation of {names} fits {folder.name}")
    return " + ".join(name for name, _ in done), " + ".join(what for _, what in done)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def dump(path: Path, value: Any) -> None:
    """Write a JSON file, halves of surrogate pairs and NaN included."""
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key of every object and every index of every list (of long lists the first)."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:6]):
            yield (*path, index)
            yield from places(item, (*path, index))


def at(value: Any, path: tuple) -> Any:
    """What stands at a place."""
    for key in path:
        value = value[key]
    return value


def shown(value: Any, most: int = 60) -> str:
    """A value in a line of the record."""
    return repr(value)[:most].encode("ascii", "backslashreplace").decode()
