"""The experts of a mixture in vLLM, whose weights are stacks of codes of the checkpoint.

Tokens are sorted by expert, and each projection is one call of torch.ops.quip.grouped_linear. With expert parallelism
(`--enable-expert-parallel`) every process holds some of the experts; a single expert is not divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from .. import ops as _ops  # noqa: F401 - registers torch.ops.quip
from ..checkpoints.headers import DAMAGED
from ..nn.empty import check_transforms
from ..nn.experts import stacked_grids
from ..nn.stacks import Stack
from .parts import WITHOUT_FILES, Origin

GATE_UP, DOWN = "gate_up_proj", "down_proj"
# Those whose formula is gate(first half) ⊙ second half.
_ACTIVATIONS = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


class _Tensor(NamedTuple):
    """A stacked tensor: its shape with all experts, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class QuipExpertsMethod(FusedMoEMethodBase):
    """The method of one layer of experts.

    Args:
        moe: vLLM's description of the layer.
        origins: of the projections `gate_up_proj` and `down_proj`.
        name: of the layer in vLLM.

    Raises:
        ValueError: the experts compute more than gated projections, or they would have to be divided.
    """

    def __init__(self, moe: Any, origins: dict[str, Origin], name: str):
        super().__init__(moe)
        self.origins, self.name = origins, name
        parallel = moe.moe_parallel_config
        if parallel.tp_size > 1:
            raise ValueError(
                f"{name}: quantized experts cannot be divided among {parallel.tp_size} processes: add "
                "--enable-expert-parallel, with which every process holds whole experts"
            )
        if moe.has_bias or moe.activation not in _ACTIVATIONS:
            raise ValueError(
                f"{name}: quantized experts with biases or the activation {moe.activation.value!r} cannot be served by "
                "vLLM: use transformers-quip serve"
            )
        config = get_current_vllm_config()
        if config.device_config.device_type != "cpu" and not config.model_config.enforce_eager:
            raise ValueError(f"{name}: quantized experts cannot be recorded in CUDA graphs: add --enforce-eager")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """See the base class: register the stacked tensors. Raises `ValueError` if codebook or transforms do not fit."""
        inner, total = intermediate_size_per_partition, layer.global_num_experts
        sizes = {GATE_UP: (2 * inner, hidden_size), DOWN: (hidden_size, inner)}
        self.tensors: dict[str, _Tensor] = {}
        for projection, (rows, columns) in sizes.items():
            origin = self.origins[projection]
            check_transforms(origin.name, origin.form[1:3], rows, columns)
            grids = stacked_grids(Stack(projection, total, rows, columns, False), origin.form.codebook, origin.name)
            for name, grid in grids.items():
                dtype = grid.dtype_in(params_dtype) or params_dtype
                self.tensors[f"{projection}_{name}"] = _Tensor((total, *grid.empty_shape()), dtype)
            self.tensors[f"{projection}_su"] = _Tensor((total, columns), params_dtype)
            self.tensors[f"{projection}_sv"] = _Tensor((total, rows), params_dtype)
        self.stored = {
            projection: [
                name for name in self.tensors if name.startswith(f"{projection}_") and name[-3:] not in ("_su", "_sv")
            ]
            for projection in sizes
        }
        own = list(range(total))
        if layer.expert_map is not None:  # the number here of every expert, or -1
            places = layer.expert_map.tolist()
            own = sorted((expert for expert in own if places[expert] >= 0), key=places.__getitem__)
        self.own, self.experts = own, num_experts
        self.expects_all = get_current_vllm_config().load_config.load_format not in WITHOUT_FILES
        self.loaded: set[str] = set()
        for name, tensor in self.tensors.items():
            parameter = nn.Parameter(torch.empty((num_experts, *tensor.shape[1:]), dtype=tensor.dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(name)})
            layer.register_parameter(name, parameter)
        # vLLM's own expects a tensor for each expert, or dense ones
        layer.load_weights = self._load_all(layer)
        layer.w2_qweight = torch.empty(0)  # vLLM's LoRA layers ask for its device

    def _loader(self, name: str) -> Callable[..., None]:
        def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
            wanted = self.tensors[name]
            same_kind = loaded_weight.is_floating_point() == wanted.dtype.is_floating_point
            if tuple(loaded_weight.shape) != wanted.shape or not same_kind:
                raise ValueError(
                    f"{self.name}.{name} is {loaded_weight.dtype} {list(loaded_weight.shape)} instead of {wanted.dtype} "
                    f"{list(wanted.shape)}: {DAMAGED}"
                )
            param.data.copy_(loaded_weight if len(self.own) == wanted.shape[0] else loaded_weight[self.own])
            self.loaded.add(name)

        return load

    def _load_all(self, layer: Any) -> Callable[[Iterable[tuple[str, torch.Tensor]]], Iterator[str]]:
        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
            for name, tensor in weights:
                if name not in self.tensors:
                    raise ValueError(
                        f"{self.name}: the checkpoint has {name}, which quantized experts do not have: {DAMAGED}"
                    )
                parameter = layer.get_parameter(name)
                parameter.weight_loader(parameter, tensor)
                yield name

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """See the base class. Raises `ValueError` for tensors that the checkpoint does not have."""
        missing = sorted(self.tensors.keys() - self.loaded)
        if missing and self.expects_all:
            raise ValueError(f"{self.name}: {', '.join(missing[:4])} of its experts are not in the checkpoint")
        layer.w2_qweight = layer.w2_qweight.to(layer.down_proj_su.device)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's kernels do not run."""
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts' outputs; of those that this process holds.

        Args:
            x: [tokens, hidden]. topk_weights, topk_ids: [tokens, k].
        """
        tokens, k = topk_ids.shape
        ids = topk_ids.long()
        if layer.expert_map is not None:
            ids = layer.expert_map.to(ids.dtype)[ids]
            ids = torch.where(ids < 0, self.experts, ids)
        chosen, order = ids.reshape(-1).sort(stable=True)
        numbers = torch.arange(self.experts, device=chosen.device, dtype=chosen.dtype)
        ends = torch.searchsorted(chosen, numbers, right=True)
        inner = self._product(layer, GATE_UP, x[order // k], ends)
        gated = inner.new_empty((inner.shape[0], inner.shape[1] // 2))
        apply_moe_activation(layer.activation, gated, inner)
        y = self._product(layer, DOWN, gated, ends) * topk_weights.reshape(-1)[order, None]
        restored = torch.empty_like(y).index_copy_(0, order, y)
        return restored.view(tokens, k, -1).sum(1).to(x.dtype)

    def _product(self, layer: Any, projection: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The products of sorted tokens with their experts' weights; zeros for experts of other processes."""
        weight = [getattr(layer, name) for name in self.stored[projection]]
        su, sv = getattr(layer, f"{projection}_su"), getattr(layer, f"{projection}_sv")
        return torch.ops.quip.grouped_linear(x, ends, weight, su, sv, *self.origins[projection].form)
