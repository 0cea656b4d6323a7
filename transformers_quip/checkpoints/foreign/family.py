"""The interface of a family of foreign checkpoints; everything else is common to all families."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ...config.storage import PLAIN, Storage
from ..headers import DAMAGED, TensorInfo


@dataclass(frozen=True)
class Form:
    """The native form of one quantized linear, with the details needed to re-pack its tensors.

    Attributes:
        rows, columns: m and n of the linear, without padding.
        codebook, incoherence, residual_scale: as in `QuipConfig`; incoherence a pair.
        storage: its record in the config.
        details: further facts that the family's `repack` needs.
    """

    rows: int
    columns: int
    codebook: str
    incoherence: tuple[str, str]
    residual_scale: float | None = None
    storage: Storage = PLAIN
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def padded(self) -> tuple[int, int]:
        """(m', n') of the codes."""
        return self.storage.padded or (self.rows, self.columns)


@dataclass(frozen=True)
class Source:
    """The tensors that a file has for one quantized linear.

    Attributes:
        name: of the linear in the file.
        tensors: shape, type and file of each, by the last part of its name.
        keys: their names, as Transformers has renamed them.
        read: reads one of them, by the last part of its name; for small ones only, while the loading is planned.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, str]
    read: Callable[[str], torch.Tensor]

    def number(self, kind: str, dtypes: tuple[str, ...] = ("I64", "I32")) -> int:
        """A tensor that must be there and is one integer. Raises `ValueError` if it is not."""
        shape = self.require(kind, dtypes)
        if math.prod(shape) != 1:
            raise ValueError(f"{self.name}.{kind} has shape {list(shape)} instead of one number: {DAMAGED}")
        return int(self.read(kind))

    def shape(self, kind: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if the tensor is missing."""
        info = self.tensors.get(kind)
        return None if info is None else info.shape

    def require(self, kind: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with one of these types (and this shape).

        Raises:
            ValueError: it is missing, or its type or shape is another.
        """
        info = self.tensors.get(kind)
        if info is None:
            raise ValueError(f"{self.name}.{kind} is missing: {DAMAGED}")
        if info.dtype not in dtypes or (shape is not None and info.shape != shape):
            expected = " or ".join(dtypes) + ("" if shape is None else f" {list(shape)}")
            raise ValueError(f"{self.name}.{kind} is {info.dtype} {list(info.shape)} instead of {expected}: {DAMAGED}")
        return info.shape


FLOATING = ("F16", "BF16", "F32")


class Family(abc.ABC):
    """A family of checkpoints, such as QuIP#'s.

    Attributes:
        name: for messages.
        marker: the kind of tensor (the last part of its name) that every quantized linear has.
        kinds: all kinds of tensors except the bias.
        fused: names of linears that are stored as one fused linear, by the name of the fused one.
        refused: parts of some checkpoints that are not supported, and the patterns of the names of their modules.
    """

    name: str
    marker: str
    kinds: tuple[str, ...]
    fused: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    refused: Mapping[str, str] = MappingProxyType({})

    def siblings(self, name: str) -> dict[str, str]:
        """Tensors of a linear that are stored under other modules: kind → name."""
        return {}

    @abc.abstractmethod
    def check(self, parameters: Mapping[str, Any]) -> None:
        """Look at the checkpoint's description of itself. Raises `ValueError` that names the first unsupported option."""

    def folded_factor(self, config: Any, name: str) -> float:
        """The number by which the package multiplied the weight of a linear before it was quantized.

        Args:
            config: of the model (a `PretrainedConfig`).
            name: of the linear in the file.

        Raises:
            ValueError: the package folds factors into this architecture that are not known.
        """
        return 1.0

    @abc.abstractmethod
    def describe(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """The native form of a linear; reads no large tensor.

        Args:
            source: its tensors.
            rows, columns: m and n that the model wants.
            parameters: the checkpoint's description of itself.

        Raises:
            ValueError: tensors are missing, contradictory or of a kind that is not supported; the message names them.
        """

    def is_table(self, source: Source) -> bool:
        """Whether these are the tensors of a quantized embedding, not of a linear."""
        return False

    def describe_table(self, source: Source, rows: int, columns: int, parameters: Mapping[str, Any]) -> Form:
        """As [`describe`], of an embedding [rows, columns] for whose tensors [`is_table`] is true."""
        raise NotImplementedError(f"{self.name} has no quantized embeddings")

    @abc.abstractmethod
    def repack(self, tensors: Mapping[str, torch.Tensor], form: Form) -> dict[str, torch.Tensor]:
        """The native tensors of a linear, without loss; a pure function.

        Args:
            tensors: by kind, as [`Source.tensors`] lists them, all on one device; without the bias.
            form: the result of [`describe`].

        Returns:
            By the names of the parameters of `nn.QuipLinear` (`nn.general.GeneralLinear`), contiguous.
        """


def is_one_of(value: Any, known: Collection[str]) -> bool:
    """Whether a value out of a JSON file is one of these names; it may be of any type, even unhashable."""
    return isinstance(value, str) and value in known


def is_finite_number(value: Any) -> bool:
    """Whether a value out of a JSON file is a number that float64 can hold; true and false are not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def is_true(parameters: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Whether a flag of a config is set, which may be missing or null. Raises `ValueError` if it is not a boolean."""
    value = parameters.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"The checkpoint's config has {key}={value!r}, which must be true or false")
    return default if value is None else value


def zeros_beyond(vector: torch.Tensor, size: int) -> torch.Tensor:
    """A vector, extended by zeros to this size, in float32."""
    return torch.nn.functional.pad(vector.float(), (0, size - vector.shape[0]))
