"""Linear layers and output heads of vLLM whose weights are quantized linears of the checkpoint, one or several.

Loading: vLLM hands each tensor to the parameter of its name, with the number of the linear that it belongs to. One
parameter for each name (`codes`, `su`, …) has room for all parts. Its loader cuts this process's share out of the tensor.
`process_weights_after_loading` makes parameters of the parts (`quip_0_codes`, …) from the same memory, in the form that the
kernels of the device take. Where vLLM reloads weights, it restores the first ones and calls it again.

Computing: neighbouring quantized parts are one call of torch.ops.quip.bundle, which rotates the input once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.utils import set_weight_attrs

from .. import ops as _ops  # noqa: F401 - registers torch.ops.quip
from ..nn.shares import Scheme, outputs_of
from ..ops import packing
from ..ops.backend import TRITON_DEVICES
from ..ops.bundle import described
from ..ops.same_input import have_same_bytes
from .parts import WITHOUT_FILES, DensePart, GeneralPart, Origin, Part, Place, QuantizedPart, Ranges, all_of, part_of

_ALIGNMENT = 64  # bytes
# Numbers of vectors whose kernels are tuned before vLLM records graphs.
_TUNED = (1, 4, 16, 64, 256)


class QuipLinearMethod(LinearMethodBase):
    """The method of one layer.

    Args:
        origins: of the linears that it is made of; None for one that was left dense.
        prefix: the layer's name in vLLM.
    """

    def __init__(self, origins: Sequence[Origin | None], prefix: str):
        self.origins, self.prefix = list(origins), prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """See the base class: register the parameters that vLLM loads.

        Raises:
            ValueError: the checkpoint's linears do not have this layer's sizes.
        """
        place = _place(layer)
        sizes, own = _outputs(layer, output_partition_sizes, place)
        if len(self.origins) == 1 and len(sizes) > 1:  # fused in the checkpoint, too
            begins = [sum(sizes[:i]) for i in range(len(sizes))]
            own = [[(begin + first, begin + last) for begin, ((first, last),) in zip(begins, own, strict=True)]]
            sizes = [sum(sizes)]
        if len(sizes) != len(self.origins):
            raise ValueError(f"{self.prefix} has {len(sizes)} parts in vLLM, and {len(self.origins)} in the checkpoint")
        self.parts: list[Part] = [
            part_of(origin, f"{self.prefix} (part {i})", m, input_size, outputs, place, params_dtype)
            for i, (origin, m, outputs) in enumerate(zip(self.origins, sizes, own, strict=True))
        ]
        self.place, self.width = place, sum(output_partition_sizes)
        self.runs = _runs(self.parts)
        self.linears = {
            run[0]: described([part.share.form for part in (self.parts[i] for i in run) if isinstance(part, QuantizedPart)])
            for run in self.runs
        }
        self.expects_all = get_current_vllm_config().load_config.load_format not in WITHOUT_FILES
        self.loaded: set[tuple[int, str]] = set()
        self.rooms = _rooms(self.parts)
        for name, room in self.rooms.items():
            parameter = nn.Parameter(torch.empty(room.size // room.dtype.itemsize, dtype=room.dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(name), "weight_loader_numel": room.numbers})
            layer.register_parameter(name, parameter)
        # vLLM's LoRA layers ask for the device of this tensor, those of an output head for `weight`
        self.stand_in = "weight" if isinstance(layer, ParallelLMHead) else "qweight"
        setattr(layer, self.stand_in, torch.empty(0, dtype=params_dtype))

    def _loader(self, name: str) -> Callable[..., None]:
        def load(param: torch.Tensor, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
            if loaded_shard_id is None:
                loaded_shard_id = getattr(loaded_weight, "shard_id", None)
            index = {None: 0, "q": 0, "k": 1, "v": 2}.get(loaded_shard_id, loaded_shard_id)
            part = self.parts[index] if isinstance(index, int) and index < len(self.parts) else None
            slot = next((slot for slot in part.slots if slot.name == name), None) if part else None
            if part is None or slot is None:
                raise ValueError(f"{self.prefix}: the checkpoint has {name} for part {loaded_shard_id!r}, which needs none")
            given = part.checked(slot, loaded_weight, part.whole_shape(name))
            _view(param, self.rooms[name].offsets[index], slot.dtype, slot.shape).copy_(given)
            self.loaded.add((index, name))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """See the base class. Raises `ValueError` for tensors that the checkpoint does not have."""
        if not all(name in layer._parameters for name in self.rooms):
            return  # called again without new weights
        missing = [
            f"{part.name}.{slot.name}"
            for i, part in enumerate(self.parts)
            for slot in part.slots
            if self.expects_all and (i, slot.name) not in self.loaded
        ]
        if missing:
            raise ValueError(
                f"{self.prefix}: {', '.join(missing[:4])} {'are' if missing[1:] else 'is'} not in the checkpoint"
            )
        self.loaded.clear()
        rooms = {name: layer._parameters.pop(name) for name in self.rooms}
        last_su: torch.Tensor | None = None
        for i, part in enumerate(self.parts):
            found = {
                slot.name: _view(rooms[slot.name], self.rooms[slot.name].offsets[i], slot.dtype, slot.shape)
                for slot in part.slots
            }
            if isinstance(part, QuantizedPart):
                found = _packed(part, part.prepared(found))
                if last_su is not None and have_same_bytes(found["su"], last_su):
                    found["su"] = last_su  # by the same memory, the op knows that one rotation serves both
                last_su = found["su"]
            parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in found.items()}
            for name, parameter in parameters.items():
                layer.register_parameter(f"quip_{i}_{name}", parameter)
            if isinstance(part, GeneralPart):
                part.take(parameters)
        setattr(layer, self.stand_in, getattr(layer, self.stand_in).to(next(iter(rooms.values())).device))
        self._tune(layer)

    def _tune(self, layer: Any) -> None:
        """On a GPU: compile and tune the kernels before vLLM records graphs, in which that is not possible."""
        for run in self.runs:
            parameter = layer._parameters[f"quip_{run[0]}_{self.parts[run[0]].slots[0].name}"]
            part = self.parts[run[0]]
            if parameter.device.type in TRITON_DEVICES and isinstance(part, QuantizedPart):
                dtype = torch.get_default_dtype()
                for count in _TUNED:
                    self._bundle(layer, run, torch.zeros(count, _width(part), dtype=dtype, device=parameter.device))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """This process's outputs of the layer for x [..., n], or its summand of all outputs if inputs are divided."""
        whole = x
        if self.place.size > 1 and self.place.divides_inputs and not self._is_local(self.parts[0]):
            whole = all_of(x)
        outputs: list[torch.Tensor] = []
        for run in self.runs:
            part = self.parts[run[0]]
            if isinstance(part, QuantizedPart):
                outputs += self._quantized(layer, run, x if self._is_local(part) else whole)
            elif isinstance(part, GeneralPart):
                outputs.append(self._own(part, part.module(whole)))
            else:
                outputs.append(nn.functional.linear(x, getattr(layer, f"quip_{run[0]}_weight")))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self.width > y.shape[-1]:  # rows of an output head that only fill up its last processes
            y = nn.functional.pad(y, (0, self.width - y.shape[-1]))
        return y if bias is None else y + bias

    def _is_local(self, part: Part) -> bool:
        """Whether the part takes this process's inputs, where inputs are divided."""
        return isinstance(part, DensePart) or (isinstance(part, QuantizedPart) and part.share.scheme is Scheme.BLOCKS)

    def _bundle(self, layer: Any, run: Sequence[int], x: torch.Tensor) -> torch.Tensor:
        """The products of neighbouring quantized parts."""
        parts: list[Any] = [self.parts[i] for i in run]
        weight = [getattr(layer, f"quip_{i}_{name}") for i, part in zip(run, parts, strict=True) for name in part.tensors]
        su, sv = ([getattr(layer, f"quip_{i}_{name}") for i in run] for name in ("su", "sv"))
        return torch.ops.quip.bundle(x, weight, su, sv, self.linears[run[0]])

    def _quantized(self, layer: Any, run: Sequence[int], x: torch.Tensor) -> list[torch.Tensor]:
        parts: list[Any] = [self.parts[i] for i in run]
        y = self._bundle(layer, run, x)
        if self.place.size == 1 or all(part.share.scheme is Scheme.BLOCKS for part in parts):
            return [y]
        pieces = list(y.split([part.share.rows[1] - part.share.rows[0] for part in parts], dim=-1))
        gathered = [k for k, part in enumerate(parts) if part.share.scheme is Scheme.ROWS]
        if gathered and not self.place.divides_inputs:
            # one message for all parts: the ranks' pieces follow one another
            sent = all_of(torch.cat([pieces[k] for k in gathered], dim=-1))
            ranks = sent.unflatten(-1, (self.place.size, -1)).split([pieces[k].shape[-1] for k in gathered], dim=-1)
            for k, piece in zip(gathered, ranks, strict=True):
                pieces[k] = piece.flatten(-2)
        for k, (i, part) in enumerate(zip(run, parts, strict=True)):
            if part.share.scheme is Scheme.ROWS:
                z = pieces[k]
                if self.place.divides_inputs:
                    begin, end = part.share.rows
                    z = nn.functional.pad(z, (begin, part.m - end))
                pieces[k] = outputs_of(z, part.share, getattr(layer, f"quip_{i}_rest"))
            pieces[k] = self._own(part, pieces[k])
        return pieces

    def _own(self, part: Part, y: torch.Tensor) -> torch.Tensor:
        """This process's outputs, or its summand, from a part's outputs [..., m]."""
        scheme = part.share.scheme if isinstance(part, QuantizedPart) else Scheme.WHOLE
        if scheme is Scheme.BLOCKS or self.place.size == 1:
            return y
        if self.place.divides_inputs:  # a whole part counts once
            return torch.zeros_like(y) if scheme is Scheme.WHOLE and self.place.rank else y
        return torch.cat([y[..., begin:end] for begin, end in part.own], dim=-1)


class _Room(NamedTuple):
    """The parameter for one name.

    Attributes:
        dtype: of the parameter; bytes where the parts have different ones.
        size: in bytes. numbers: that are loaded.
        offsets: of the parts, in bytes.
    """

    dtype: torch.dtype
    size: int
    numbers: int
    offsets: dict[int, int]


def _rooms(parts: Sequence[Part]) -> dict[str, _Room]:
    """The parameters that vLLM loads: for each name, room for the tensors of all parts, each at an aligned address."""
    rooms = {}
    for name in dict.fromkeys(slot.name for part in parts for slot in part.slots):
        slots = {i: slot for i, part in enumerate(parts) for slot in part.slots if slot.name == name}
        offsets, end = {}, 0
        for i, slot in slots.items():
            offsets[i] = end
            end += math.prod(slot.shape) * slot.dtype.itemsize
            end += -end % _ALIGNMENT
        dtypes = {slot.dtype for slot in slots.values()}
        numbers = sum(math.prod(slot.shape) for slot in slots.values())
        rooms[name] = _Room(dtypes.pop() if len(dtypes) == 1 else torch.uint8, end, numbers, offsets)
    return rooms


def _view(room: torch.Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor in the memory of a parameter, from this byte on."""
    size = room.element_size()
    count = math.prod(shape) * dtype.itemsize
    return room.data[offset // size : (offset + count) // size].view(dtype).view(tuple(shape))


def _packed(part: QuantizedPart, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with codes in the form that their device computes fastest."""
    weight = [tensors[name] for name in part.tensors]
    made = packing.converted(weight, part.share.form.codebook, torch.get_default_dtype())
    return tensors | dict(zip(part.tensors, made, strict=True))


def _runs(parts: Sequence[Part]) -> list[list[int]]:
    """The parts in runs that are computed together: neighbouring quantized ones, and each other one by itself."""
    runs: list[list[int]] = []
    for i, part in enumerate(parts):
        if runs and isinstance(part, QuantizedPart) and isinstance(parts[i - 1], QuantizedPart):
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _width(part: QuantizedPart) -> int:
    """The inputs of the share."""
    return part.share.columns[1] - part.share.columns[0]


def _place(layer: Any) -> Place:
    if isinstance(layer, ReplicatedLinear):
        return Place(0, 1, False)
    return Place(layer.tp_rank, layer.tp_size, isinstance(layer, RowParallelLinear))


def _outputs(layer: Any, local: Sequence[int], place: Place) -> tuple[list[int], list[Ranges]]:
    """Of each part of a layer, all outputs, and those that this process needs."""
    if isinstance(layer, ParallelLMHead):
        indices = layer.shard_indices
        return [layer.org_vocab_size], [[(indices.org_vocab_start_index, indices.org_vocab_end_index)]]
    if place.divides_inputs or place.size == 1:
        return list(local), [[(0, size)] for size in local]
    sizes: list[int] = []
    own: list[Ranges] = []
    for i, size in enumerate(local):
        # several processes have the same heads of keys and values where there are more processes than these heads
        replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and i in (1, 2) else 1
        sizes.append(size * place.size // replicas)
        begin = place.rank // replicas * size
        own.append([(begin, begin + size)])
    return sizes, own
