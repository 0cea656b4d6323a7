"""The description of the calibration data in config.json; a saved model does not need the data itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def describe_dataset(value: Any) -> str | None:
    """The kind and the number of the data that a config was given, such as "3 texts given by the caller"."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        ids = value.get("input_ids")
        return _counted(len(next(iter(value.values()))), "data set row") if ids is None else describe_dataset(ids)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _counted(len(value) if value.ndim > 1 else 1, "token sequence")
    if not hasattr(value, "__len__"):
        return "a stream given by the caller"
    if isinstance(value, (list, tuple)):
        if isinstance(value[0], int):
            return _counted(1, "token sequence")
        if isinstance(value[0], str):
            return _counted(len(value), "text")
        if not isinstance(value[0], Mapping) and not _is_chat(value[0]):
            return _counted(len(value), "token sequence")
    return _counted(len(value), "data set row")


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], Mapping)


def _counted(count: int, kind: str) -> str:
    return f"{count} {kind}{'s' if count != 1 else ''} given by the caller"
