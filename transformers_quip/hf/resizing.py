"""Refuse another number of tokens, before any change, for a model whose head or table is quantized.

Transformers' `resize_token_embeddings` replaces the table of the inputs first and the head afterwards, so that an error of
a quantized head alone would leave a model whose parts do not fit. It has no hook, so `patches` wraps the method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..nn.stand_in import PackedWeight


def resize_token_embeddings(original: Callable) -> Callable:
    """Checks, then resizes."""

    def resize_token_embeddings(
        self: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        _check(self, new_num_tokens, pad_to_multiple_of)
        return original(self, new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    return resize_token_embeddings


def _check(model: Any, tokens: int | None, multiple: int | None) -> None:
    """Raise `ValueError` if a quantized head or table would have to get another number of rows."""
    if tokens is None and multiple is None:
        return  # the caller only asks for the table
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tokens is None:
        tokens = table.weight.shape[0]
    if multiple:
        tokens = -(-tokens // multiple) * multiple
    names = {id(module): name for name, module in model.named_modules()}
    for module in (table, head):
        weight = getattr(module, "weight", None)
        if isinstance(weight, PackedWeight) and weight.shape[0] != tokens:
            raise ValueError(
                f"{names[id(module)]} is quantized: it is stored as codes for {weight.shape[0]} tokens, and cannot get "
                f"{tokens}. Another number of tokens (resize_token_embeddings) needs dense weights: change the model "
                "before it is quantized, or call model.dequantize()"
            )
