"""`ignore_mismatched_sizes` for quantized models.

Transformers lets the caller of `from_pretrained` keep the sizes of the config where a tensor of the files has others, such
as a head for another number of labels: it initialises the tensor. Its releases up to 5.17 do so only without a quantizer;
with one, the tensor of the file takes the place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from .source import may_be_resized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def expected_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shapes of the model's parameters by their names, if the files may have others; else nothing."""
    return {name: value.shape for name, value in model.named_parameters()} if may_be_resized() else {}


@torch.no_grad()
def initialise_others(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
    """Initialise, as the model does, the parameters that have other shapes now, in the shapes that they had.

    Args:
        model: loaded.
        shapes: see [`expected_shapes`]; names that are not there any more are left out.
    """
    parameters = dict(model.named_parameters())
    for name, shape in shapes.items():
        found = parameters.get(name)
        if found is None or found.shape == shape:
            continue
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(torch.empty(shape, dtype=found.dtype, device=found.device)))
        module._is_hf_initialized = False
        model._initialize_weights(module)
        logger.warning("%s has shape %s in the checkpoint: it is initialised in shape %s", name, [*found.shape], [*shape])
