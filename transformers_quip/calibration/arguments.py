"""Which arguments a model's forward takes, asked of its signature: Transformers renames them from release to release."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name under which the model's forward takes its key/value cache; None for a forward without one.

    Transformers renamed it from `past_key_values` to `cache` in 5.24. Models with code of their own may use either name.
    """
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """The keyword arguments with which the model's forward makes no key/value cache; none where it never makes one."""
    parameters = inspect.signature(model.forward).parameters
    takes = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"use_cache": False} if takes else {}
