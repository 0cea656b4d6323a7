"""Origin and calibration of a model, as its config.json claims them. That file may hold anything.

Every function returns the kind of value that it promises, or None, whatever it finds. `text` makes it safe to show.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypedDict

# As the Hub has it: one name, or an owner and a name.
_REPO_ID = re.compile(r"(?!.*(--|\.\.))([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)


class Origin(TypedDict, total=False):
    """Which dense model was quantized: `base_model` is an id on the Hub, `folder` any name, `versions` of packages."""

    base_model: str
    folder: str
    versions: dict[str, str]


class Calibration(TypedDict, total=False):
    """The calibration data, in words, and the mean relative error of a layer's output (dimensionless)."""

    data: str
    mean_relative_error: float


class Tuning(TypedDict, total=False):
    """KL divergence to the dense model on held-out text before and after tuning, in nats per token; tokens of training."""

    held_out_before: float
    held_out_after: float
    tokens: int


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names of the model's classes; empty if there are none."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def origin(quantization: Mapping[str, Any]) -> Origin:
    """See [`Origin`]; empty where nothing usable is said."""
    found = quantization.get("origin")
    if not isinstance(found, Mapping):
        return {}
    result: Origin = {}
    base_model, folder, versions = found.get("base_model"), found.get("folder"), found.get("versions")
    if isinstance(base_model, str) and is_repo_id(base_model):
        result["base_model"] = base_model
    elif isinstance(base_model, str):  # whatever it is, it is not a link
        result["folder"] = base_model
    if isinstance(folder, str):
        result["folder"] = folder
    if isinstance(versions, Mapping):
        result["versions"] = {str(name): version for name, version in versions.items() if isinstance(version, str)}
    return result


def calibration(quantization: Mapping[str, Any]) -> Calibration | None:
    """See [`Calibration`]; None where nothing is said."""
    found = quantization.get("calibration")
    if not isinstance(found, Mapping) or not set(found) - {"tuning"}:
        return None
    data = found.get("data")
    result: Calibration = {"data": data if isinstance(data, str) else "something that is not described"}
    error = found.get("mean_relative_error")
    if isinstance(error, float) and math.isfinite(error):
        result["mean_relative_error"] = error
    return result


def tuning(quantization: Mapping[str, Any]) -> Tuning | None:
    """See [`Tuning`]; None for a model that was not tuned, or whose tuning was not kept."""
    calibration = quantization.get("calibration")
    found = calibration.get("tuning") if isinstance(calibration, Mapping) else None
    if not isinstance(found, Mapping) or found.get("kept") is not True:
        return None
    before, after = found.get("held_out_before"), found.get("held_out_after")
    if not (isinstance(before, float) and isinstance(after, float) and math.isfinite(before) and math.isfinite(after)):
        return None
    result: Tuning = {"held_out_before": before, "held_out_after": after}
    if type(found.get("tokens")) is int and 0 < found["tokens"] < 2**53:
        result["tokens"] = found["tokens"]
    return result


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    return len(name) <= 96 and _REPO_ID.fullmatch(name) is not None and not name.endswith(".git")
