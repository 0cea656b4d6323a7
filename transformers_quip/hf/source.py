"""Where the model that is being loaded comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration.tokenizer import Source
from .foreign import _source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def source_of(model: PreTrainedModel) -> Source:
    """The folder or repository of a model that `from_pretrained` is loading, and the arguments that it was given.

    Of a repository with an adapter alone, that is the repository of its base model.
    """
    name, arguments = _source.get()
    return Source(model.name_or_path or name or "", dict(arguments))
