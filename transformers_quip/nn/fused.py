"""Linears that are stored differently from the model: several as one quantized linear, or one as several.

QuIP# quantizes the projections that read one input as one matrix, whose output transform mixes the rows of all of them.
So they are computed together, once, and each module of the model returns its share of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..ops.backend import get_activations, get_backend
from ..ops.cpu import torch_private
from ..ops.same_input import SameInput
from .linear import QuipLinear
from .stand_in import PackedWeight


class FusedRows(nn.Linear):
    """Some of the outputs of a fused linear, which is another module in the same parent. This module has no weights.

    The first module that is called with an input computes the outputs for all and caches them in the [`Fusion`]. The others
    take theirs from there if they are called with the same tensor and it still holds the same values, and the last one
    clears the cache. In any order and number of calls, the result equals the result of a separate linear.

    Args:
        fusion: shared by all modules that return outputs of one linear.
        begin, end: the outputs.
    """

    def __init__(self, fusion: Fusion, begin: int, end: int):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.begin, self.end = begin, end
        self.register_parameter("bias", None)
        self.fusion = fusion
        self._is_hf_initialized = True

    @property
    def in_features(self) -> int:  # type: ignore[override] # on purpose: the fused linear has it
        """n."""
        return self.fusion.linear.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override] # on purpose: computed from begin and end
        """The number of its outputs."""
        return self.end - self.begin

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override] # on purpose: a linear without a dense weight
        """A stand-in; see [`QuipLinear.weight`]."""
        linear = self.fusion.linear
        return PackedWeight.like(linear.su, self.out_features, self.in_features, linear.weight_dtype)

    def reset_parameters(self) -> None:
        """See [`QuipLinear.reset_parameters`]."""
        raise TypeError("a quantized linear cannot be initialised at random: load or quantize a weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., end − begin]."""
        return self.fusion.take(self, x)[..., self.begin : self.end]

    def extra_repr(self) -> str:
        return f"outputs {self.begin} to {self.end} of {self.fusion.name}"


class Fusion:
    """The common part of modules that share a fused linear: the linear, and its last outputs until all took theirs.

    The outputs are reused under the rule of `ops.same_input`, which compares the bytes of x and of the vectors (su, sv,
    bias), with one exception: codes count as unchanged if they are the same tensors, at the same addresses, of the same
    versions. So if NumPy, DLPack or `.data` write to codes after the first sibling was called with x, the others are not
    affected before the next x. Comparing all bytes of the codes would make q, k and v of one token 1.6 to 1.9 times as slow
    (960x576: 17 more than 27 microseconds; 6144x4096: 513 more than 578; AMD EPYC, AVX-512, 1 thread). Under torch.compile
    each of the modules calls all of the linear, and its graph computes equal calls once (`ops.graph`).

    Args:
        parent: the module that holds them all. The linear is looked up in it at every call, so that an adapter that was
            put in its place is used.
        name: of the fused linear in it.
        shares: the number of modules that take their share of each output.
    """

    def __init__(self, parent: nn.Module, name: str, shares: int):
        self.parent, self.name, self.shares = parent, name, shares
        self._outputs: SameInput[torch.Tensor] = SameInput()

    @property
    def linear(self) -> QuipLinear:
        """The fused linear itself."""
        module = getattr(self.parent, self.name)
        return module if isinstance(module, QuipLinear) else module.base_layer  # PEFT's name for the module that it wraps

    def take(self, taker: FusedRows, x: torch.Tensor) -> torch.Tensor:
        """All outputs for x, of which `taker` returns its own."""
        module = getattr(self.parent, self.name)
        if torch.compiler.is_compiling() or torch_private.is_recorded():
            return module(x)
        state = _state(module, x)
        if state is None:
            return module(x)
        key, vectors = state
        compared = (x, *vectors)
        y = self._outputs.take(taker, compared, key)
        if y is None:
            y = module(x)
            self._outputs.keep(taker, compared, key, y)
        elif self._outputs.takers == self.shares:
            self._outputs.forget()
        return y

    def __deepcopy__(self, memo: dict) -> Fusion:
        """The copy belongs to the copied parent, and its cache is empty."""
        parent = memo.get(id(self.parent))
        return Fusion(self.parent if parent is None else parent, self.name, self.shares)


def _state(module: nn.Module, x: torch.Tensor) -> tuple[tuple, list[torch.Tensor]] | None:
    """All that the result of a module depends on, except the values of x and of the vectors that are returned with it.

    None if that cannot be known.
    """
    weights: list[tuple[int, int, int]] = []
    vectors: list[torch.Tensor] = []
    for weight in module.parameters():
        if weight.is_inference():
            return None  # its changes are not counted
        weights.append((id(weight), weight.data_ptr(), weight._version))
        if weight.ndim < 2:
            vectors.append(weight)
    version = None if x.is_inference() else x._version
    settings = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x.device.type))
    flags = (module.training, x.requires_grad, version, *settings, get_backend(), get_activations())
    return (id(module), *flags, *weights), vectors


class JoinedLinear(nn.Module):
    """A linear of the model that is stored as several quantized ones, whose outputs follow one another.

    Args:
        parts: name → quantized linear, all of the same input.
    """

    def __init__(self, parts: Mapping[str, QuipLinear]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._is_hf_initialized = True

    def parts(self) -> Iterator[Any]:
        """Its parts in their order: quantized linears, the dense ones that replaced them, or adapters around them."""
        return self.children()

    @property
    def in_features(self) -> int:
        """n."""
        return next(self.parts()).in_features

    @property
    def out_features(self) -> int:
        """The sum of the parts' outputs."""
        return sum(part.out_features for part in self.parts())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m]."""
        return torch.cat([part(x) for part in self.parts()], dim=-1)
