"""Replace dense linears inside a model by quantized ones, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..incoherence import sides
from .embedding import QuipEmbedding
from .empty import check_transforms, empty_linear
from .experts import QuipExperts
from .linear import QuipLinear
from .stacks import Stack, find_stacks

LINEARS = (nn.Linear, Conv1D)
DenseLinear: TypeAlias = nn.Linear | Conv1D


def is_dense_linear(module: nn.Module) -> TypeGuard[DenseLinear]:
    """Whether this is an `nn.Linear` or a `Conv1D`, or of a subclass that computes the same as `nn.Linear`."""
    kind: Any = type(module)
    return kind in LINEARS or (isinstance(module, nn.Linear) and _computes_linear(kind))


@functools.lru_cache(maxsize=256)
def _computes_linear(kind: Any) -> bool:
    """Whether the forward of a subclass of `nn.Linear` is that of `nn.Linear`, tried with random numbers.

    Not for PyTorch's own subclasses, whose weights are read by others, and ours.
    """
    if kind.__module__.partition(".")[0] in ("torch", "transformers_quip"):
        return False
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        weight, bias, x = torch.randn(3, 5), torch.randn(3), torch.randn(2, 4, 5)
        for given in (bias, None):
            module: Any = object.__new__(kind)
            nn.Module.__init__(module)
            module.in_features, module.out_features = 5, 3
            module.weight = nn.Parameter(weight)
            module.register_parameter("bias", None if given is None else nn.Parameter(given))
            try:
                found = module.eval()(x)
            except Exception:  # of any kind: it needs more than a weight and a bias
                return False
            if not (isinstance(found, torch.Tensor) and found.shape == (2, 4, 3)):
                return False
            if not torch.allclose(found, nn.functional.linear(x, weight, given), atol=1e-5):
                return False
    return True


def is_dense_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether this is exactly an `nn.Embedding` that only looks rows up: a subclass may do more (Gemma's scale them)."""
    return type(module) is nn.Embedding and module.max_norm is None


def empty_like(linear: DenseLinear, config: Any, name: str) -> QuipLinear:
    """An empty quantized linear in the place of a dense one. The bias is the dense one's parameter, loaded or not.

    Args:
        linear: `nn.Linear` or `Conv1D`; its sizes, its bias and its weight's dtype are used.
        config, name: see [`empty_linear`].
    """
    rows, columns = linear_shape(linear)
    biased, conv1d = linear.bias is not None, isinstance(linear, Conv1D)
    module = empty_linear(rows, columns, config, name, bias=biased, dtype=linear.weight.dtype, conv1d=conv1d)
    if biased:
        module.bias = linear.bias
    return module.train(linear.training)


def empty_embedding(embedding: nn.Embedding, config: Any, name: str) -> QuipEmbedding:
    """An empty quantized embedding in the place of a dense one; arguments and errors are those of [`empty_like`]."""
    options, padded = config.for_module(name), config.storage_of(name).padded
    rows, columns = embedding.weight.shape
    if padded and padded[0] != rows:
        raise ValueError(f"{name}: padded={list(padded)} does not fit an embedding of [{rows}, {columns}]")
    columns = padded[1] if padded else columns
    # an embedding has a transform on its input side alone
    check_transforms(name, (sides(options.incoherence)[0], "none"), rows, columns)
    try:
        return QuipEmbedding.like(embedding, options, columns)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def linear_shape(module: DenseLinear | nn.Embedding) -> tuple[int, int]:
    """(out_features, in_features) of a dense linear; of an embedding, (rows of the table, columns)."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(module: DenseLinear | nn.Embedding, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [out, in] of a dense linear, a view (a Conv1D keeps it transposed), or the table of an embedding.

    Args:
        module: `nn.Linear`, `Conv1D` or `nn.Embedding`.
        weight: its weight as it is stored, if the module does not hold it (yet).
    """
    weight = module.weight if weight is None else weight
    return weight.T if isinstance(module, Conv1D) else weight


def quantized_linears(model: nn.Module) -> dict[str, QuipLinear]:
    """Every quantized linear of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuipLinear)}


def quantized_modules(model: nn.Module) -> dict[str, QuipLinear | QuipEmbedding | QuipExperts]:
    """Every quantized linear, embedding and module of experts of the model by name."""
    kinds = (QuipLinear, QuipEmbedding, QuipExperts)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def quantized_names(model: nn.Module) -> list[str]:
    """The names that plans and config.json have for the quantized weights: of linears, embeddings and stacks of experts."""
    names = []
    for name, module in quantized_modules(model).items():
        names += [f"{name}.{stack}" for stack in module.stacks] if isinstance(module, QuipExperts) else [name]
    return names


def dense_stacks(model: nn.Module) -> dict[str, Stack]:
    """The stacks of experts of the model that are dense, by the full names of their parameters."""
    return {
        f"{name}.{key}": stack
        for name, module in model.named_modules()
        if not isinstance(module, QuipExperts)
        for key, stack in find_stacks(module).items()
    }


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The dense weight that a plan calls by this name: [out, in] of a linear or an embedding, or a stack of experts."""
    owner, _, last = name.rpartition(".")
    parent = model.get_submodule(owner)
    return parent.get_parameter(last) if last in find_stacks(parent) else dense_weight(model.get_submodule(name))


def replace_experts(model: nn.Module, name: str, config: Any) -> QuipExperts:
    """Put quantized experts without values (on the meta device) in the place of the dense ones called `name`."""
    module = QuipExperts(model.get_submodule(name), config, name)
    model.set_submodule(name, module)
    return module


def quantized_linear(linear: DenseLinear, quantized: Any, config: Any) -> QuipLinear:
    """The module that replaces `linear`.

    Args:
        linear: the dense `nn.Linear` or `Conv1D`; its bias, and its weight's dtype and device are used.
        quantized: has `tensors` by name, `su` [n] and `sv` [m] (`quantize.layer.QuantizedWeight`).
        config: the config of this module ([`QuipConfig`]).

    Raises:
        ValueError: the tensors do not have the shapes of that linear.
    """
    module = empty_like(linear, config, "")
    module.take(quantized, linear.weight.device)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return module


def replace_linear(model: nn.Module, name: str, quantized: Any, config: Any) -> QuipLinear:
    """Put a quantized linear in the place of the dense one called `name`, and return it; see [`quantized_linear`]."""
    module = quantized_linear(model.get_submodule(name), quantized, config)
    model.set_submodule(name, module)
    return module


def replace_embedding(model: nn.Module, name: str, quantized: Any, config: Any) -> QuipEmbedding:
    """Put a quantized embedding in the place of the dense one called `name`, and return it; see [`replace_linear`].

    Raises:
        TypeError: that module is not an `nn.Embedding`.
        ValueError: the tensors do not have the shapes of that table.
    """
    embedding = model.get_submodule(name)
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{name} is a {type(embedding).__name__}, not an nn.Embedding")
    module = QuipEmbedding.like(embedding, config)
    module.take(quantized, embedding.weight.device)
    model.set_submodule(name, module)
    return module


def replace_by_empty(model: nn.Module, name: str, config: Any) -> QuipLinear | QuipEmbedding:
    """Put a quantized module without values (on the meta device) in the place of the dense one called `name`.

    The bias stays the same parameter, loaded or not.
    """
    dense = model.get_submodule(name)
    module: QuipLinear | QuipEmbedding
    if is_dense_embedding(dense):
        module = empty_embedding(dense, config, name)
    else:
        module = empty_like(dense, config, name)
    model.set_submodule(name, module)
    return module


def leave_inference_mode(model: nn.Module) -> None:
    """Replace tensors that were made in `torch.inference_mode` by equal ones that gradients can flow past.

    Transformers makes them where a model is loaded in that mode, and outside of it PyTorch refuses them.
    """
    owners: dict[int, list[tuple[dict[str, Any], str]]] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    owners.setdefault(id(tensor), []).append((tensors, name))
    with torch.inference_mode(False), torch.no_grad():
        for places in owners.values():
            owner, key = places[0]
            tensor = owner[key]
            copy = tensor.clone()
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, tensor.requires_grad)
            for owner, key in places:
                owner[key] = copy


def freeze(model: nn.Module) -> None:
    """Switch off the gradients of every quantized module's parameters (loading switches on the gradients of floats)."""
    for module in quantized_modules(model).values():
        module.requires_grad_(False)


def pack(model: nn.Module) -> None:
    """Convert the codes of every quantized linear into the form that its device computes fastest, once for all calls.

    A module does that by itself when it is first called, but not while it is being compiled.
    """
    for module in quantized_linears(model).values():
        module.pack_if_wanted()


def to_dense(module: QuipLinear | QuipEmbedding | QuipExperts, dtype: torch.dtype | None = None) -> nn.Module:
    """The dense module that computes the same: an `nn.Linear`, or the `Conv1D`, embedding or experts that were quantized.

    Args:
        dtype: of its parameters; None: the dtype of the stand-in for the weight.
    """
    if isinstance(module, QuipExperts):
        return module.to_dense(dtype)
    if isinstance(module, QuipEmbedding):
        dense = nn.Embedding.from_pretrained(module.dequantize(dtype), freeze=False, padding_idx=module.padding_idx)
        return dense.train(module.training)
    dtype = dtype or module.weight_dtype
    weight = module.dequantize(dtype)
    with torch.device("meta"):
        if module.conv1d:
            dense = Conv1D(module.out_features, module.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    dense.weight = nn.Parameter(weight)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)


def replace_by_dense(model: nn.Module, dtype: torch.dtype | None = None) -> Mapping[str, nn.Module]:
    """Put a dense module in the place of every quantized one, and return them by name.

    Raises:
        ValueError: codes are not in memory (the model is offloaded).
    """
    quantized = quantized_modules(model)
    for name, module in quantized.items():
        if any(tensor.is_meta for tensor in module.parameters()):
            raise ValueError(
                f"{name} is offloaded, so the model cannot be dequantized: load it without a device_map that offloads"
            )
    dense = {}
    for name, module in quantized.items():
        dense[name] = to_dense(module, dtype)
        model.set_submodule(name, dense[name])
    return dense
