"""LoRA adapters that begin with the error of quantization, instead of zero."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration import BlockHessians, HessianAccumulator, capture_inputs, find_blocks
from ..calibration.dataset import load_token_ids
from ..calibration.device import evaluating
from ..calibration.observe import observe_until
from ..calibration.precision import calibration_autocast
from ..config import QuipConfig
from ..nn.replace import quantized_linears
from ..quantize.block import replayed_densely
from .dense import DenseWeights
from .layers import adapted_linears, check_in_memory, require_peft
from .low_rank import low_rank

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_RANK = 16


@torch.inference_mode(False)
@torch.no_grad()
def residual_init(
    model: PreTrainedModel | PeftModel,
    dense: str | os.PathLike | nn.Module,
    rank: int | None = None,
    *,
    config: LoraConfig | None = None,
    dataset: Any = None,
    tokenizer: Any = None,
    num_samples: int = 64,
    sequence_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    niter: int | None = None,
    token: str | None = None,
    progress: bool = True,
) -> PeftModel:
    """Begin LoRA adapters with the best approximation of W - Ŵ, the error of the quantized weights.

    Without data, BA is the truncated singular value decomposition of W - Ŵ, as in LoftQ (arXiv 2310.08659); the codes stay
    as they are. With data, BA minimises the error of each layer's output on it, ‖(W - Ŵ - BA) H^½‖ with H = E[x xᵀ], as in
    EoRA (arXiv 2410.21271); give many more tokens than the layers have inputs. Then the model is read block by block, and
    each block's inputs are those that the adapters before it lead to.

    The dense weights are read one at a time. In addition to the quantized model, memory holds one of them with its factors;
    with data, also one block's Hessians and decoded weights, and one set of hidden states.

    Args:
        model: quantized, in memory; or a `PeftModel` with LoRA on it, whose active adapter is initialised again.
        dense: the dense model: a folder with safetensors files, an id on the Hub, or a model in memory.
        rank: of the adapters that are made for a model without any; 16 by default. `lora_alpha` is the same number, so that
            the adapters are not scaled.
        config: a `LoraConfig` for them, instead of rank.
        dataset, tokenizer, num_samples, sequence_length, seed: calibration data, as in `QuipConfig`; None: none.
        batch_size: sequences in one forward pass.
        niter: power iterations of a randomized decomposition (as in PEFT's "pissa_niter_4"), faster for large layers; None:
            an exact one.
        token: for the Hub.
        progress: show tqdm bars.

    Returns:
        The `PeftModel`: `model` itself, or a new one around it.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: model is not a model of Transformers or a `PeftModel`.
        ValueError: no LoRA layer is on a quantized linear, the adapter is a variant of LoRA (DoRA), the dense model is
            another one, or the data cannot be used.
    """
    peft = require_peft()
    if niter is not None and niter < 0:
        raise ValueError(f"niter={niter} must be 0 or more, or None for the exact decomposition")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank={rank!r} must be an integer of at least 1")
    data = QuipConfig(
        dataset=dataset, tokenizer=tokenizer, num_samples=num_samples, sequence_length=sequence_length, seed=seed
    )
    has_adapters = isinstance(model, peft.PeftModel)
    if has_adapters and (rank is not None or config is not None):
        raise ValueError("the model has adapters, whose rank and config are fixed: leave rank and config out")
    if rank is not None and config is not None:
        raise ValueError("give rank or config, not both: config has a rank")
    if not quantized_linears(model):
        raise ValueError(f"{type(model).__name__} has no quantized linears, so its adapters have no error to begin with")
    weights = DenseWeights(dense, model.get_base_model() if has_adapters else model, token)
    if config is None:
        rank = _RANK if rank is None else rank
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = model if has_adapters else peft.get_peft_model(model, config)
    try:
        _fill(adapted, weights, data, batch_size, niter, progress)
    except BaseException:
        if not has_adapters:
            adapted.unload()  # the caller's model is as it was
        raise
    return adapted


def _fill(
    adapted: PeftModel, weights: DenseWeights, data: QuipConfig, batch_size: int, niter: int | None, progress: bool
) -> None:
    """Check everything, then fill every LoRA layer of the active adapter; see [`residual_init`]."""
    base = adapted.get_base_model()
    layers = adapted_linears(base)
    adapter = _active_adapter(adapted, layers)
    for name, layer in layers.items():
        check_in_memory(name, layer)
        weights.weight(name, _shape(layer))
    ids = None
    if data.dataset is not None:
        ids, description = load_token_ids(data, base)
        logger.info("The adapters begin with the errors on %s.", description)
    for layer in layers.values():
        if adapter in layer.lora_B:
            layer.lora_B[adapter].weight.zero_()  # its earlier value has no part in the inputs that are observed
    with tqdm(total=len(layers), desc="Adapters", unit="layer", disable=not progress) as bar:
        task = _Task(weights, adapter, niter, bar)
        if ids is None:
            for name, layer in layers.items():
                task.fill(name, layer, None)
        else:
            _fill_with_data(base, layers, ids, batch_size, task, progress)
    logger.info("The adapters take %.1f %% of the energy of the error of the mean layer.", 100 * task.share)


def _active_adapter(model: PeftModel, layers: Mapping[str, Any]) -> str:
    """The adapter to fill. Raises `ValueError` unless it is plain LoRA on quantized linears."""
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"one adapter must be active, not {len(active)}: choose it with set_adapter")
    name = active[0]
    if not any(name in layer.lora_A for layer in layers.values()):
        raise ValueError(
            f"the adapter {name!r} has no LoRA layer on a quantized linear: choose others by target_modules of LoraConfig"
        )
    variant = next((n for n, layer in layers.items() if name in layer.lora_variant), None)
    if variant is not None:
        raise ValueError(f"{variant} has a variant of LoRA (such as DoRA): only plain LoRA can begin with the error")
    return name


class _Task:
    """Fills LoRA layers one by one.

    Attributes:
        share: the mean over the layers of the share of the error's energy, in the metric that was used, that is taken.
    """

    def __init__(self, weights: DenseWeights, adapter: str, niter: int | None, bar: tqdm):
        self.weights, self.adapter, self.niter, self.bar = weights, adapter, niter, bar
        self._shares: list[float] = []

    @property
    def share(self) -> float:
        return sum(self._shares) / len(self._shares)

    def fill(self, name: str, layer: Any, hessian: torch.Tensor | None) -> None:
        """Set B and A of one layer."""
        self.bar.update()
        if self.adapter not in layer.lora_A:
            return
        quantized = layer.get_base_layer()
        weight = self.weights.weight(name, _shape(layer)).to(quantized.su.device, torch.float32)
        residual = weight - quantized.dequantize(torch.float32)
        if not residual.isfinite().all():
            raise ValueError(f"{name} has NaN or Inf in its dense or its decoded weight: the checkpoint is damaged")
        lora_a, lora_b = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        hessian = None if hessian is None else hessian.to(residual.device)
        b, a = low_rank(residual, len(lora_a), hessian, self.niter)
        root = layer.scaling[self.adapter] ** 0.5
        lora_b.copy_(b / root)
        lora_a.copy_(a / root)
        if layer.lora_B[self.adapter].bias is not None:
            layer.lora_B[self.adapter].bias.zero_()
        before, after = (_energy(value, hessian) for value in (residual, residual - b @ a))
        self._shares.append(1 - after / before if before > 0 else 1.0)


def _fill_with_data(
    base: PreTrainedModel, layers: Mapping[str, Any], ids: torch.Tensor, batch_size: int, task: _Task, progress: bool
) -> None:
    """Fill every layer in the metric of its inputs, block by block; a layer after the blocks in that of its own."""
    blocks_name, blocks = find_blocks(base)
    inputs = capture_inputs(base, blocks, ids, batch_size, progress=progress)
    for index, block in enumerate(blocks):
        prefix = f"{blocks_name}.{index}."
        names = [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]
        with calibration_autocast(block), replayed_densely(block, list(quantized_linears(block))):
            hessians = BlockHessians(prefix).collect(block, names, inputs.of_block(index))
        for leader, group in hessians.groups.items():
            hessian = hessians.pop(leader)
            for name in group:
                task.fill(prefix + name, layers[prefix + name], hessian)
        reached = [name for group in hessians.groups.values() for name in group]
        for name in (name for name in names if name not in reached):
            logger.warning("%s: no token of the data reached it, so it begins without their metric", prefix + name)
            task.fill(prefix + name, layers[prefix + name], None)
        if index + 1 < len(blocks):
            with calibration_autocast(block), replayed_densely(block, list(quantized_linears(block))):
                inputs.advance(index, block)
    for name, layer in layers.items():
        if not name.startswith(f"{blocks_name}."):
            columns = layer.get_base_layer().in_features
            accumulator = HessianAccumulator(columns, layer.get_base_layer().su.device, name)
            with evaluating(base), calibration_autocast(base):
                observe_until(base, layer, ids.split(batch_size), accumulator.add)
            task.fill(name, layer, accumulator.hessian())


def _shape(layer: Any) -> tuple[int, int]:
    quantized = layer.get_base_layer()
    return quantized.out_features, quantized.in_features


def _energy(residual: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """tr(R H Rᵀ)."""
    moved = residual if hessian is None else residual @ hessian.to(residual)
    return (moved.double() * residual.double()).sum().item()
