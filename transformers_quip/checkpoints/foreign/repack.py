"""One quantized linear or embedding of a foreign checkpoint → its native tensors, without loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...nn.embedding import QuipEmbedding
from ...nn.empty import empty_linear
from ...nn.linear import QuipLinear
from ...nn.replace import empty_embedding
from ..headers import DAMAGED
from .family import Family, Form, Source
from .native_config import native_config


@dataclass(frozen=True)
class ForeignLinear:
    """One quantized linear of a foreign checkpoint and its place in the model.

    Attributes:
        name: of the native linear in the model.
        family, form: its family, and the result of [`Family.describe`] or [`Family.describe_table`].
        source: its tensors in the files.
        dense: the model has a plain matrix there instead of a linear (a router): it gets the decoded weight.
        table: it is an embedding.
    """

    name: str
    family: Family
    form: Form
    source: Source
    dense: bool = False
    table: bool = False

    @property
    def first(self) -> str:
        """Name of one tensor that it becomes."""
        return f"{self.name}.weight" if self.dense else f"{self.name}.codes"

    @torch.no_grad()
    def repack(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The native tensors by their full names.

        Args:
            tensors: by kind, as `source.tensors` lists them.

        Raises:
            ValueError: a scale is infinite or NaN.
        """
        for kind, value in tensors.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise ValueError(f"{self.source.name}.{kind} has numbers that are not finite: {DAMAGED}")
        others = {kind: value for kind, value in tensors.items() if kind != "bias"}
        result = {key: value.contiguous() for key, value in self.family.repack(others, self.form).items()}
        if "folded" in self.form.details:
            result["sv"] = result["sv"] / self.form.details["folded"]
        if not all(result[key].isfinite().all() for key in ("su", "sv")):  # divided by a zero
            raise ValueError(f"The scales of {self.source.name} are not all finite: {DAMAGED}")
        if "bias" in tensors:
            result["bias"] = tensors["bias"][: self.form.rows].contiguous()
        if self.dense:
            return {self.first: self._decoded(result)}
        return {f"{self.name}.{key}": value for key, value in result.items()}

    def _decoded(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        form = self.form
        config = native_config([self])
        module: QuipLinear | QuipEmbedding
        if self.table:
            with torch.device("meta"):
                module = empty_embedding(nn.Embedding(form.rows, form.columns), config, self.name)
        else:
            module = empty_linear(form.rows, form.columns, config, self.name, bias=False, dtype=torch.float32)
        module.load_state_dict(dict(tensors), assign=True)
        return module.dequantize()


def repack(linear: ForeignLinear, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The native tensors of a linear, in the types of the parameters of the model.

    Args:
        linear: and its place in the model.
        tensors: by kind, as `linear.source.tensors` lists them.
        model: has the empty quantized linear already; on the meta device or not.

    Raises:
        ValueError: the tensors do not fit: the files and the model contradict each other.
    """
    result = {}
    for name, value in linear.repack(tensors).items():
        parameter = model.get_parameter(name)
        if parameter.shape != value.shape or parameter.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{name} is re-packed to {value.dtype} {list(value.shape)}, but the model has {parameter.dtype} "
                f"{list(parameter.shape)} there"
            )
        result[name] = value.to(parameter.dtype)
    return result
