"""Merge LoRA adapters into the codes: the sum of decoded weight and adapter is rounded again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .. import codebooks
from ..calibration import capture_inputs, find_blocks
from ..calibration.dataset import load_token_ids
from ..config import QuipConfig
from ..evaluation import Divergence, divergence, keep_predictions
from ..nn import replace
from ..quantize.bars import advance
from ..quantize.block import ModuleResult, quantize_block
from .layers import adapted_linears, check_in_memory, require_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class MergeReport:
    """The cost of merging.

    Attributes:
        divergence: of the merged model from the model with adapters, on held-out sequences.
        modules: a record for each layer, as in `QuantizationReport.modules`; with "change", ‖ΔW‖² / ‖W + ΔW‖², the share of
            the adapter in the energy of the weight. Where the relative error is larger, rounding may undo the adapter.
    """

    divergence: Divergence
    modules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def mean_relative_error(self) -> float:
        """The mean over the layers of the share of the output's energy that rounding has lost."""
        return sum(record["relative_error"] for record in self.modules) / len(self.modules)


@torch.inference_mode(False)
@torch.no_grad()
def merge_and_requantize(
    model: PeftModel,
    dataset: Any,
    *,
    tokenizer: Any = None,
    num_samples: int = 256,
    sequence_length: int = 512,
    held_out: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> tuple[PreTrainedModel, MergeReport]:
    """Merge the active LoRA or DoRA adapter of a quantized model into its weights, and round them again.

    A quantized weight cannot take an adapter as it is. So each layer with an adapter is decoded, the adapter is added,
    and the sum is quantized with the options of the model's config, block by block as at first. The rounding errors are
    new ones; the report gives their cost. Keep the adapter apart if that is too much. Layers without an adapter keep
    their codes. Adapters of dense layers, and `modules_to_save`, are merged as PEFT does it.

    Memory: the model, and one block's Hessians and dense weights.

    Args:
        model: a `PeftModel` with LoRA on quantized linears; it is used up.
        dataset, tokenizer, num_samples, sequence_length, seed: calibration data, as in `QuipConfig`; best text like that
            on which the adapter was trained.
        held_out: further sequences, on which the cost is measured.
        batch_size: sequences in one forward pass.
        progress: show tqdm bars.

    Returns:
        (the model without adapters, which `save_pretrained` saves; the cost).

    Raises:
        ImportError: PEFT is not installed.
        TypeError: model is not a `PeftModel`.
        ValueError: no adapter is on a quantized linear, it cannot be merged, the codebook encodes nothing, a layer lies
            outside the decoder blocks, or the data cannot be used.
    """
    peft = require_peft()
    if not isinstance(model, peft.PeftModel):
        raise TypeError(f"merge_and_requantize needs a PeftModel, not a {type(model).__name__}")
    base = model.get_base_model()
    config: Any = getattr(base.config, "quantization_config", None)
    layers, adapter = adapted_linears(base), _active(model)
    blocks_name, blocks = find_blocks(base)
    layers = {name: layer for name, layer in layers.items() if adapter in layer.lora_A}
    _check(layers, adapter, config, blocks_name)
    if held_out < 1:
        raise ValueError(f"held_out={held_out} must be at least 1")
    data = QuipConfig(
        dataset=dataset, tokenizer=tokenizer, num_samples=num_samples, sequence_length=sequence_length, seed=seed
    )
    if data.dataset is None:
        raise ValueError("dataset=None: merging needs data, because weights are rounded for the inputs that they get")
    ids, description = load_token_ids(data, base, tokenizer, held_out=held_out)
    if len(ids) <= held_out:
        raise ValueError(f"the data give {len(ids)} sequences, and {held_out} are held out: give more text")
    logger.info("Merging adapters on %s.", description)
    ids, held = ids[:-held_out], ids[-held_out:]
    before = keep_predictions(base, held, batch_size)
    inputs = capture_inputs(base, blocks, ids, batch_size, progress=progress)
    report = MergeReport(Divergence(0.0, 0.0, 0.0, 1.0, 0))
    with tqdm(total=len(layers), desc="Merging", unit="layer", disable=not progress) as bar:
        changes: dict[str, float] = {}

        def done(module: ModuleResult) -> None:
            report.modules.append(module.record | {"change": changes[module.name]})
            advance(bar, module.name, module.quantized.statistics["relative_error"], report.mean_relative_error)

        for index, block in enumerate(blocks):
            prefix = f"{blocks_name}.{index}."
            own = {name.removeprefix(prefix): layer for name, layer in layers.items() if name.startswith(prefix)}
            for name, layer in own.items():
                dense, changes[prefix + name] = _merged(layer, adapter)
                block.set_submodule(name, dense)
            configs = {name: config.for_module(prefix + name) for name in own}
            quantize_block(block, inputs.of_block(index), configs, prefix, inputs.store, done)
    merged = model.merge_and_unload()
    report.divergence = divergence(merged, before, held, batch_size)
    logger.info("Merging costs a KL divergence of %.4f nats per token.", report.divergence.mean)
    return merged, report


def _active(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise ValueError(f"one adapter must be active, not {len(model.active_adapters)}: choose it with set_adapter")
    return model.active_adapters[0]


def _check(layers: Mapping[str, Any], adapter: str, config: Any, blocks_name: str) -> None:
    """Refuse whatever would be found out later: layers, variants and codebooks that cannot be merged or rounded."""
    if not layers:
        raise ValueError(
            f"the adapter {adapter!r} has no LoRA layer on a quantized linear: merge_and_unload() of PEFT merges the others"
        )
    if not isinstance(config, QuipConfig) or config.foreign is not None:
        raise ValueError("only a model that was quantized by this package can be rounded again: keep the adapter apart")
    for name, layer in layers.items():
        check_in_memory(name, layer)
        book = codebooks.get(config.for_module(name).codebook_spec)
        if book.is_read_only:
            raise ValueError(f"{name}: the codebook {book.name} encodes nothing, so no weight can be rounded to it")
        if not name.startswith(f"{blocks_name}."):
            raise ValueError(f"{name} lies outside the decoder blocks, so its adapter cannot be merged: keep it apart")
        variant = layer.lora_variant.get(adapter)
        if variant is not None and not layer.use_dora.get(adapter):
            raise ValueError(f"{name}: {type(variant).__name__} cannot be merged into codes: only LoRA and DoRA can")
        if layer.lora_bias.get(adapter) and layer.get_base_layer().bias is None:
            raise ValueError(f"{name} has no bias that could take that of the adapter (lora_bias=True): keep it apart")
        if not all(p.isfinite().all() for n, p in layer.named_parameters() if n.split(".")[1:2] == [adapter]):
            raise ValueError(f"{name}: the adapter {adapter!r} is damaged: it has NaN or Inf")


def _merged(layer: Any, adapter: str) -> tuple[nn.Module, float]:
    """The dense layer that computes the same with the adapter merged into it, and the adapter's share of its energy."""
    quantized = layer.get_base_layer()
    before = quantized.dequantize(torch.float32)
    scaling = layer.scaling[adapter]
    after = before + scaling * (layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float())
    if layer.use_dora.get(adapter):
        magnitude = layer.lora_magnitude_vector[adapter].weight.float()
        after = after * (magnitude / after.norm(dim=1))[:, None]
    dense: Any = replace.to_dense(quantized)
    replace.dense_weight(dense).copy_(after)
    if layer.lora_bias.get(adapter):
        dense.bias.add_(layer.lora_B[adapter].bias * scaling)
    return dense, ((after - before).square().sum() / after.square().sum()).item()
