"""The checks of QuipConfig's single options: each returns the value as it is kept, or raises an error.

The caller names the option and the value; the `ValueError` of a check continues: "must be True or False".
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from .. import codebooks
from .. import incoherence as transforms
from ..registry import suggest


def integer(minimum: int, maximum: int = 2**63 - 1) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            upper = "" if maximum == 2**63 - 1 else f" and at most {maximum}"
            raise ValueError(f"must be an integer of at least {minimum}{upper}")
        return value

    return check


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def or_none(value: Any) -> Any:
        try:
            return None if value is None else check(value)
        except ValueError as error:
            raise ValueError(f"{error}, or None") from None

    return or_none


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def positive(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError("must be a finite number above 0")
    return value


def bits(value: Any) -> int | float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError("must be a number of bits per weight, such as 2, 2.5, 3 or 4")
    return int(value) if value == int(value) else value


def residual_scale(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < abs(value) <= sys.float_info.max:
        raise ValueError("must be None or a finite number other than 0")
    return float(value)


def name(names: Callable[[], tuple[str, ...]], optional: bool = False) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if (value is None and optional) or (isinstance(value, str) and value in names()):
            return value
        raise ValueError(
            f"must be one of {', '.join(map(repr, names()))}{' or None' if optional else ''}{suggest(value, names())}"
        )

    return check


def codebook(value: Any) -> str | None:
    if codebooks.is_known(value):
        return value
    if isinstance(value, str) and value.startswith("trellis"):
        try:
            codebooks.get(value)
        except ValueError as error:
            if ":" in value:  # one of the names that are made of parts
                raise ValueError(f"must be the name of a codebook: {error}") from None
    return name(lambda: (*codebooks.names(), *codebooks.families()), optional=True)(value)


def choice(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(map(repr, allowed))}")
        return value

    return check


def scale(value: Any) -> str | float:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError("must be 'auto' or a finite number above 0")
        return value
    try:
        return positive(value)
    except ValueError:
        raise ValueError("must be 'auto' or a finite number above 0") from None


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a non-empty string")
    return value


def patterns(value: Any) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be None or a list of module names or patterns, such as ['lm_head']")
    return list(value)


def incoherence(value: Any) -> str | list[str]:
    if not isinstance(value, (list, tuple)):
        return _transform(value)
    if len(value) != 2:
        raise ValueError("must be the name of a transform, or a pair of them: (input side, output side)")
    return [_transform(name) for name in value]


def _transform(value: Any) -> str:
    if not transforms.is_known(value):
        raise ValueError(f"must be one of {transforms.unknown(value)}")
    return value


def dataset(value: Any) -> Any:
    empty = "is empty: give at least one text or token sequence, 'self', or None for no calibration"
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if math.prod(value.shape) == 0:
            raise ValueError(empty)
        return value
    splits = getattr(value, "column_names", None)
    if isinstance(splits, dict):
        raise ValueError(
            f"has the splits {', '.join(splits)}: choose one, such as dataset[{next(iter(splits), 'train')!r}]"
        )
    columns = list(value.values()) if isinstance(value, Mapping) else []
    is_readable = any(hasattr(value, name) for name in ("__iter__", "__getitem__")) and not isinstance(value, (str, bytes))
    if not is_readable or any(isinstance(column, str) or not hasattr(column, "__len__") for column in columns):
        raise ValueError(
            "must be 'self', the name of a data set, a list of strings, of chats, of token ids or of dictionaries, a "
            "tensor of token ids, a tokenizer's output, a datasets.Dataset, an iterable of such rows, or None for no "
            "calibration"
        )
    if (hasattr(value, "__len__") and len(value) == 0) or (columns and max(map(len, columns)) == 0):
        raise ValueError(empty)
    return value


def tokenizer(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or callable(value) or (isinstance(value, str) and value):
        return value
    raise ValueError("must be None, a tokenizer, or the name or folder of one")


def short(value: Any) -> str:
    """A value for a message: at most 80 characters, an array by its shape."""
    array = isinstance(value, (torch.Tensor, np.ndarray))
    text = f"<{type(value).__name__} of shape {tuple(value.shape)}>" if array else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
