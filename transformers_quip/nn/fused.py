"""Linears of a model that are stored otherwise: several as one quantized linear, or one as several.

QuIP# quantizes the projections that read one input as one matrix, whose output transform mixes the rows of all of them.
So they are computed together, once, and the model's own modules hand out their shares.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .linear import QuipLinear
from .stand_in import PackedWeight


class FusedRows(nn.Linear):
    """Some of the outputs of a fused linear that stands beside this module in its parent; it has no weights.

    The first module that is called with an input computes the outputs for all and leaves them in the parent's
    [`Fusion`]; those that are called with the same tensor take theirs from there, and the last one clears it. Whatever the
    order or number of calls, the result is that of a linear of its own.

    Args:
        fusion: shared by all that hand out the outputs of one linear.
        begin, end: the outputs.
    """

    def __init__(self, fusion: Fusion, begin: int, end: int):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.begin, self.end = begin, end
        self.register_parameter("bias", None)
        self.fusion = fusion
        self._is_hf_initialized = True

    @property
    def in_features(self) -> int:
        """n."""
        return self.fusion.linear.in_features

    @property
    def out_features(self) -> int:
        """How many outputs it hands out."""
        return self.end - self.begin

    @property
    def weight(self) -> PackedWeight:
        """A stand-in; see [`QuipLinear.weight`]."""
        linear = self.fusion.linear
        return PackedWeight.like(linear.su, self.out_features, self.in_features, linear.weight_dtype)

    def reset_parameters(self) -> None:
        """See [`QuipLinear.reset_parameters`]."""
        raise TypeError("a quantized linear cannot be initialised at random: load or quantize a weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., end − begin]."""
        return self.fusion.take(x)[..., self.begin : self.end]

    def extra_repr(self) -> str:
        return f"outputs {self.begin} to {self.end} of {self.fusion.name}"


class Fusion:
    """What the modules that share a fused linear share: the linear, and its last outputs until all have taken theirs.

    Args:
        parent: the module that holds them all. The linear is looked up in it at every call, so that an adapter that was
            put in its place is used.
        name: of the fused linear in it.
        shares: how many modules take their share of each output.
    """

    def __init__(self, parent: nn.Module, name: str, shares: int):
        self.parent, self.name, self.shares = parent, name, shares
        self._held: tuple[torch.Tensor, int, torch.Tensor, int] | None = None

    @property
    def linear(self) -> QuipLinear:
        """The fused linear itself."""
        module = getattr(self.parent, self.name)
        return module if isinstance(module, QuipLinear) else module.base_layer  # PEFT's name for what it wraps

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """All outputs for x."""
        # Read once: another thread may replace it at any time. The input itself is held, so that `is` cannot mean another
        # tensor at the same address; its version tells that it was not changed in between.
        held = self._held
        if held is not None and held[0] is x and held[1] == _version(x):
            y, left = held[2], held[3] - 1
            if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
                y = getattr(self.parent, self.name)(x)  # computed where no gradient was wanted
        else:
            y, left = getattr(self.parent, self.name)(x), self.shares - 1
        self._held = (x, _version(x), y, left) if left > 0 else None
        return y

    def __deepcopy__(self, memo: dict) -> Fusion:
        """Of the copied parent, with nothing held."""
        parent = memo.get(id(self.parent))
        return Fusion(self.parent if parent is None else parent, self.name, self.shares)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_held": None}


def _version(x: torch.Tensor) -> int:
    # inference tensors count no versions; a compiler's tensors are not changed behind its back
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


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

    @property
    def in_features(self) -> int:
        """n."""
        return next(self.children()).in_features

    @property
    def out_features(self) -> int:
        """The sum of the parts' outputs."""
        return sum(part.out_features for part in self.children())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m]."""
        return torch.cat([part(x) for part in self.children()], dim=-1)
