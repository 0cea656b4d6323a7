"""The source of the model that is being loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.tokenizer import Source

# The folder or repository that `from_pretrained` is loading, and its arguments.
LOADED: ContextVar[tuple[str | None, Mapping[str, Any]]] = ContextVar("loaded", default=(None, {}))


def source_of(model: PreTrainedModel) -> Source:
    """The folder or repository of a model that `from_pretrained` is loading, and the arguments that it was given.

    For a repository with only an adapter, that is the repository of its base model.
    """
    from ..calibration.tokenizer import Source  # a quarter of the time that importing the package takes

    name, arguments = LOADED.get()
    return Source(model.name_or_path or name or "", dict(arguments))


def may_be_resized() -> bool:
    """Whether the caller of `from_pretrained` lets Transformers initialise tensors of other shapes."""
    return bool(LOADED.get()[1].get("ignore_mismatched_sizes"))
