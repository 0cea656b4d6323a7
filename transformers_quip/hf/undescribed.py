"""A checkpoint with quantized weights whose config.json does not say so: refused after it was loaded as a dense one.

Without this, a lost or misspelt "quantization_config" gives a model with random weights, and a notice alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..checkpoints.complete import MARKERS
from ..checkpoints.headers import DAMAGED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of tensors that are stored together with codes, in the formats of QuIP quantizers.
_BESIDE = frozenset(("su", "sv", "SU", "SV", "suh", "svh"))


def check_described(
    model: PreTrainedModel, missing: Collection[str], unexpected: Collection[str], source: str | None
) -> None:
    """Refuse a dense model whose files have the codes of quantized linears instead of weights that it misses.

    Args:
        model: as `from_pretrained` has loaded it.
        missing: weights of the model that the files do not have, by their names.
        unexpected: tensors of the files that the model has no place for.
        source: the folder or repository.

    Raises:
        ValueError: the model is not quantized, and the files have codes with their scales.
    """
    if not missing or getattr(model, "hf_quantizer", None) is not None:
        return
    parts = {(name.rpartition(".")[0], name.rpartition(".")[2]) for name in unexpected}
    codes = [(module, kind) for module, kind in parts if kind in MARKERS]
    found = sorted(f"{module}.{kind}" for module, kind in codes if any((module, other) in parts for other in _BESIDE))
    if found:
        raise ValueError(
            f"{source or 'The checkpoint'} has quantized weights ({found[0]} and {len(found) - 1} others), but the "
            "quantization_config of its config.json is missing or is of a quant_method that is not known, so "
            f"{type(model).__name__} would have random weights: {DAMAGED}"
        )
