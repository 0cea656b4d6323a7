"""What became of a mutated checkpoint, in one word."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from traceback import FrameSummary
from typing import Any

# Good outcomes, in the order of the table; then those that are somebody else's, and those that are faults of ours.
GOOD = ("same", "refused", "unknowable")
THEIRS = ("cryptic, theirs",)
FAULTS = ("SILENT", "cryptic, ours", "crash", "hang", "memory", "executed", "left", "not printable")
ORDER = (*GOOD, *THEIRS, *FAULTS)
# What a command of this package meets is its own to explain; while Transformers loads, only what our frames meet is.
OUR_ROUTES = ("inspect", "convert", "convert()", "card", "compare")

_OURS = re.compile(r"[/\\](transformers_quip|quip_kernels)[/\\]")
# Functions that stand in the place of Transformers' and pass on what those raise.
_PASSED_ON = ("get_hf_quantizer", "load_state_dict", "from_pretrained", "save_pretrained", "run_route")
# What the interpreter itself says of a value of a wrong type: it names neither the file nor the value.
_INTERPRETER = re.compile(
    r"unhashable type|not supported between|object is not |unsupported operand|argument of type|not iterable|"
    r"unexpected keyword|cannot unpack|values to unpack|invalid literal for|Exceeds the limit|embedded null|"
    r"could not convert|must be real number|has no attribute|has no len|indices must be|required positional|"
    r"expected str, bytes|Expecting value|codec can't|out of range|takes \d+ positional|can only concatenate"
)


def is_clear(error: BaseException, names: Iterable[str]) -> bool:
    """Whether an error is one that a user can act on.

    It is a ValueError, an OSError, a TypeError or an ImportError (none of the kinds that stand for a bug: KeyError,
    IndexError, AttributeError, AssertionError, RuntimeError, …); it names a file, a tensor, a module or an option; and it
    is not a sentence of the interpreter.

    Args:
        names: of the files, tensors, modules and options that it may speak of.
    """
    said = str(error)
    if not isinstance(error, (ValueError, OSError, TypeError, ImportError)) or isinstance(error, UnicodeError):
        return False
    if _INTERPRETER.search(said) and len(said) < 120:
        return False
    return len(said) >= 20 and any(len(name) >= 3 and name[:100] in said for name in names)


def is_ours(route: str, frames: list[FrameSummary]) -> bool:
    """Whether an error is this package's to explain."""
    own = [frame for frame in frames if _OURS.search(frame.filename) and frame.name not in _PASSED_ON]
    return route in OUR_ROUTES or bool(own)


def place(frame: FrameSummary) -> str:
    """Where an error was raised, without the machine's folders."""
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def verdict(record: dict[str, Any]) -> str:
    """One of `ORDER`.

    Args:
        record: "outcome" ("crash", "hang", "memory", "executed", "error", "same", "other", "shown"), and with it "clear",
            "ours", "damage", "left", "unprintable".
    """
    outcome = record["outcome"]
    if outcome in ("crash", "hang", "memory", "executed"):
        return outcome
    if record.get("left"):
        return "left"
    if record.get("unprintable"):
        return "not printable"
    if outcome == "error":
        if record["clear"]:
            return "refused"
        return "cryptic, ours" if record["ours"] else "cryptic, theirs"
    if outcome in ("same", "shown"):
        return "same"
    return "SILENT" if record["damage"] else "unknowable"
