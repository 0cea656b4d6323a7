"""Recognise the experts of a mixture: modules whose weights are stacks of matrices, one for each expert.

Nothing here knows an architecture by name: the parameters, their shapes and the attributes that Transformers'
`use_experts_implementation` sets say which matrices there are and in which direction they are stored.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

# The parameters of the two matrices of an expert, or of the three: those that read the input, and the one that writes.
READS = ("gate_up_proj", "up_proj", "gate_proj", "w1", "v1")
WRITES = "down_proj"
# Names of matrices of which each is flat: the first two read the input, the last one, transposed, writes.
_FLAT = ("w1", "v1", "w2")


class Stack(NamedTuple):
    """The weights of one projection of all experts of a module.

    Attributes:
        name: of the parameter in its module.
        experts: their number.
        rows, columns: outputs and inputs of each expert's matrix.
        transposed: whether the parameter holds [experts, columns, rows] instead of [experts, rows, columns].
        flat: whether its first two dimensions are one.
    """

    name: str
    experts: int
    rows: int
    columns: int
    transposed: bool
    flat: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, rows, columns)."""
        return self.experts, self.rows, self.columns

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """The shape of the parameter, with its first two dimensions apart."""
        return (self.experts, self.columns, self.rows) if self.transposed else self.shape

    @property
    def weights(self) -> int:
        """experts · rows · columns."""
        return self.experts * self.rows * self.columns

    def split(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter as [experts, rows, columns], a view."""
        weights = parameter.view(self.stored_shape)
        return weights.mT if self.transposed else weights

    def joined(self, weights: torch.Tensor) -> torch.Tensor:
        """The inverse of [`split`], contiguous."""
        weights = (weights.mT if self.transposed else weights).contiguous()
        return weights.flatten(0, 1) if self.flat else weights


def find_stacks(module: nn.Module) -> dict[str, Stack]:
    """The projections of a module of experts by the names of their parameters; none for any other module.

    They are: `down_proj` [experts, hidden, inner] with `gate_up_proj` [experts, 2·inner, hidden], or with `up_proj`, and
    maybe `gate_proj`, [experts, inner, hidden]; all of them in this order of dimensions or all transposed; or one
    `weight` [experts, outputs, inputs] of a module with `num_experts`; or `w1`, `v1` and `w2` [experts·inner, hidden] of a
    module with `moe_num_experts`.
    """
    if type(module).__module__.partition(".")[0] == "torch":
        return {}
    if set(module._parameters) == set(_FLAT):
        return _flat(module)
    matrices = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    if set(matrices) == {"weight"} and len(matrices["weight"]) == getattr(module, "num_experts", None):
        return {"weight": _stack("weight", matrices["weight"], False)}
    reads = {name: matrices[name] for name in READS if name in matrices}
    if WRITES not in matrices or not reads or set(matrices) != {*reads, WRITES}:
        return {}
    down = matrices[WRITES]
    if set(reads) == {"gate_up_proj"}:
        # [2·inner, hidden] and [hidden, inner], or [hidden, 2·inner] and [inner, hidden]
        ways = [way for way in (False, True) if _fit(reads["gate_up_proj"], down, 2, way)]
    elif "gate_up_proj" in reads:
        return {}
    else:  # transposed, these have the same shapes in exchanged roles
        ways = [way for way in (_is_transposed(module),) if all(_fit(part, down, 1, way) for part in reads.values())]
    return {name: _stack(name, matrices[name], ways[0]) for name in (*reads, WRITES)} if ways else {}


def _flat(module: nn.Module) -> dict[str, Stack]:
    shapes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
    experts = getattr(module, "moe_num_experts", 0)
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or not experts or shape[0] % experts:
        return {}
    inner, hidden = shape[0] // experts, shape[1]
    read, written = (inner, hidden, False), (hidden, inner, True)
    return {name: Stack(name, experts, *(written if name == "w2" else read), flat=True) for name in _FLAT}


def is_routed(module: Any) -> bool:
    """Whether the module computes what `use_experts_implementation` asks for: forward(x, chosen experts, their weights).

    Then its own forward can be replaced by one that sorts the tokens by expert: the first projection, `_apply_gate` or
    `act_fn`, `down_proj`, maybe `post_expert_norm`, and the weighted sum.
    """
    arguments = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    gated = getattr(module, "gate_up_proj", None) is not None and callable(getattr(module, "_apply_gate", None))
    return len(arguments) == 3 and (gated or getattr(module, "has_gate", None) is False)


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _fit(read: torch.Tensor, down: torch.Tensor, parts: int, transposed: bool) -> bool:
    """Whether a read projection of `parts` times the inner size fits the one that writes."""
    (_, rows, columns), (_, hidden, inner) = read.shape, down.shape
    if transposed:
        (rows, columns), (hidden, inner) = (columns, rows), (inner, hidden)
    return rows == parts * inner and columns == hidden


def _stack(name: str, parameter: torch.Tensor, transposed: bool) -> Stack:
    experts, rows, columns = parameter.shape
    if transposed:
        rows, columns = columns, rows
    return Stack(name, experts, rows, columns, transposed)
