"""A native checkpoint and the model without weights that it belongs to: quantized modules in place, all tensors checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoints.complete import check_complete, check_shapes, check_types
from ..checkpoints.files import Files
from ..checkpoints.finite import check_finite, check_small_finite
from ..checkpoints.headers import TensorInfo
from ..checkpoints.names import expand_names
from ..checkpoints.native import check_tensors
from ..config import QuipConfig
from ..nn import replace
from ..nn.place import place_all
from .loader import names_in_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_native(model: PreTrainedModel, config: QuipConfig) -> None:
    """Put the empty quantized modules that a native config names into a model. Raises `ValueError` if it has none."""
    recorded = config.quantized_modules or []
    place_all(model, expand_names(recorded), config)
    if not replace.quantized_modules(model):
        raise ValueError(
            f"None of the quantized modules that config.json names exists in {type(model).__name__} "
            f"(the first is {next(expand_names(sorted(recorded)), 'missing')[:80]}): is this another architecture?"
        )


def check_native(model: PreTrainedModel, files: Files, rules: list, may_be_resized: bool = False) -> dict[str, TensorInfo]:
    """Check that native files hold every tensor of the model, each in its shape and finite.

    Args:
        model: with its quantized modules in their places.
        files: of the checkpoint.
        rules: Transformers' renamings for this model.
        may_be_resized: whether dense tensors may have other shapes, because the caller asked for that.

    Returns:
        The tensors of the files by their names in the model.

    Raises:
        ValueError: they do not.
    """
    names = names_in_model(model, files.headers, rules, whole=True)
    modules = replace.quantized_modules(model)
    kinds = (replace.is_dense_linear, replace.is_dense_embedding)
    dense = [name for name, module in model.named_modules() if any(kind(module) for kind in kinds)]
    check_tensors(modules, dense, names)
    check_types(names)
    check_complete(model, names)
    if not may_be_resized:
        check_shapes(model, names)
    check_finite(modules, names, files.read)
    check_small_finite(model, names, files.read)
    return names
