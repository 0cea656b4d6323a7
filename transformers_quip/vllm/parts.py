"""The linears of the checkpoint that one layer of vLLM is made of, and the tensors that this process holds of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoints.headers import DAMAGED
from ..config import QuipConfig
from ..config.storage import Storage
from ..incoherence import STORED, sides
from ..nn.empty import check_transforms
from ..nn.general import GeneralLinear
from ..nn.shares import Scheme, Share, of_inputs, of_outputs, scales_of
from ..ops.bundle import Form

# Formats of loading in which no tensor of the checkpoint passes the loaders.
WITHOUT_FILES = ("dummy", "sharded_state", "tensorizer")
Ranges = Sequence[tuple[int, int]]


class Origin(NamedTuple):
    """A quantized linear as config.json describes it.

    Attributes:
        name: in the checkpoint.
        form: its codebook and transforms.
        storage: how its tensors are stored.
    """

    name: str
    form: Form
    storage: Storage

    @classmethod
    def of(cls, config: QuipConfig, name: str) -> Origin:
        """The description of the module of this name."""
        options = config.for_module(name)
        return cls(name, Form(options.codebook_spec, *sides(options.incoherence), options.seed), config.storage_of(name))

    @property
    def is_general(self) -> bool:
        """Whether it has parts that the ops do not compute ([`GeneralLinear`])."""
        return bool(self.storage.padded or self.storage.row_scales or STORED in self.form)


class Slot(NamedTuple):
    """A tensor that a part holds: its name in the checkpoint, shape and type."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """A process's place in its layer.

    Attributes:
        rank, size: this process's number, and the number of the processes that share the layer.
        divides_inputs: whether they divide its inputs, rather than its outputs.
    """

    rank: int
    size: int
    divides_inputs: bool


class Part:
    """One linear of the checkpoint inside a layer of vLLM.

    Args:
        m, n: its outputs and inputs. own: the outputs that this process needs.

    Attributes:
        slots: the tensors that this process holds.
    """

    slots: list[Slot]

    def __init__(self, name: str, m: int, n: int, own: Ranges):
        self.name, self.m, self.n, self.own = name, m, n, own

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor of the checkpoint."""
        raise NotImplementedError

    def checked(self, slot: Slot, tensor: torch.Tensor, whole: Sequence[int | None]) -> torch.Tensor:
        """[`cut`] of a tensor that must have this shape. Raises `ValueError` if it has not, or another type."""
        fits = tensor.ndim == len(whole) and all(
            want in (None, have) for want, have in zip(whole, tensor.shape, strict=True)
        )
        of_type = tensor.dtype == slot.dtype or (tensor.is_floating_point() and slot.dtype.is_floating_point)
        if not fits or not of_type:
            raise ValueError(
                f"{self.name}.{slot.name} is {tensor.dtype} {list(tensor.shape)} instead of {slot.dtype} {list(whole)}: "
                f"{DAMAGED}"
            )
        return self.cut(slot.name, tensor)

    def whole_shape(self, name: str) -> Sequence[int | None]:
        """The shape of a tensor in the checkpoint."""
        raise NotImplementedError


class DensePart(Part):
    """A linear that was left dense: this process's rows of its weight, or columns."""

    def __init__(self, name: str, m: int, n: int, own: Ranges, place: Place, dtype: torch.dtype):
        super().__init__(name, m, n, own)
        width = n // place.size if place.divides_inputs else n
        self.columns = slice(place.rank * width, (place.rank + 1) * width) if place.divides_inputs else slice(0, n)
        self.slots = [Slot("weight", (sum(end - begin for begin, end in own), width), dtype)]

    def whole_shape(self, name: str) -> Sequence[int | None]:
        """See [`Part.whole_shape`]."""
        return self.m, self.n

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See [`Part.cut`]."""
        return torch.cat([tensor[begin:end, self.columns] for begin, end in self.own])


class QuantizedPart(Part):
    """A quantized linear, or this process's share of it.

    Raises:
        ValueError: its sizes do not allow these transforms or tiles; the message names the linear.
    """

    share: Share

    def __init__(self, origin: Origin, m: int, n: int, own: Ranges, place: Place, dtype: torch.dtype):
        super().__init__(origin.name, m, n, own)
        check_transforms(origin.name, origin.form[1:3], m, n)
        scales = dtype if origin.storage.scales_dtype is None else getattr(torch, origin.storage.scales_dtype)
        try:
            if place.divides_inputs:
                self.share = of_inputs(origin.form, m, n, place.rank, place.size)
            else:
                self.share = of_outputs(origin.form, m, n, place.rank, place.size, own)
            grids = self.share.grids
        except ValueError as error:
            raise ValueError(f"{origin.name}: {error}") from None
        if any(None in grid.shape for grid in grids.values()):
            raise ValueError(
                f"{origin.name}: codebook {origin.form.codebook!r} stores tensors whose sizes only the file knows, which "
                "vLLM cannot load: choose another codebook"
            )
        self.tensors = list(grids)
        self.slots = [Slot(name, grid.empty_shape(), grid.dtype_in(scales) or scales) for name, grid in grids.items()]
        self.slots += [Slot("su", (_length(self.share.su),), scales), Slot("sv", (_length(self.share.sv),), scales)]
        self._whole = {name: grid.shape for name, grid in self.share.book.tensors(m, n).items()} | {"su": (n,), "sv": (m,)}

    def whole_shape(self, name: str) -> Sequence[int | None]:
        """See [`Part.whole_shape`]."""
        return self._whole[name]

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See [`Part.cut`]."""
        return self.share.cut(name, tensor)

    def prepared(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as the layer needs them: for ROWS, with both factors of sv (`shares.scales_of`)."""
        found = dict(tensors)
        if self.share.scheme is Scheme.ROWS:
            found["sv"], found["rest"] = scales_of(self.share, found["sv"])
        return found


class GeneralPart(Part):
    """A quantized linear with padding, stored transforms or scales of rows: every process holds and computes all of it."""

    def __init__(self, origin: Origin, m: int, n: int, own: Ranges, dtype: torch.dtype):
        super().__init__(origin.name, m, n, own)
        storage = origin.storage
        check_transforms(origin.name, origin.form[1:3], *(storage.padded or (m, n)))
        scales = None if storage.scales_dtype is None else getattr(torch, storage.scales_dtype)
        with torch.device("meta"):
            self.module = GeneralLinear(
                n,
                m,
                False,
                codebook=origin.form.codebook,
                incoherence=origin.form[1:3],
                seed=origin.form.seed,
                padded=storage.padded,
                row_scales=storage.row_scales,
                dtype=dtype,
                scales_dtype=scales,
            )
        self.slots = [Slot(name, tuple(p.shape), p.dtype) for name, p in self.module.named_parameters()]

    def whole_shape(self, name: str) -> Sequence[int | None]:
        """See [`Part.whole_shape`]."""
        return next(slot.shape for slot in self.slots if slot.name == name)

    def cut(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """See [`Part.cut`]."""
        return tensor

    def take(self, tensors: Mapping[str, nn.Parameter]) -> None:
        """Compute with these tensors from now on."""
        self.module._parameters.update(tensors)


def part_of(origin: Origin | None, name: str, m: int, n: int, own: Ranges, place: Place, dtype: torch.dtype) -> Part:
    """The part of this origin; None: a dense one of this name."""
    if origin is None:
        return DensePart(name, m, n, own, place, dtype)
    if origin.is_general:
        return GeneralPart(origin, m, n, own, dtype)
    return QuantizedPart(origin, m, n, own, place, dtype)


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def all_of(x: Any) -> Any:
    """The parts of all processes along the last dimension."""
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(x.contiguous())
