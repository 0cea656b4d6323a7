"""QuipQuantizer: Transformers' hooks, each a few lines that call into the rooms of this package."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..calibration.dataset import is_written_by_the_model, load_token_ids
from ..checkpoints import memory, native
from ..checkpoints.complete import check_complete
from ..checkpoints.files import Files, check_inside
from ..checkpoints.finite import check_finite, check_small_finite
from ..checkpoints.foreign.plan import METHODS, ForeignPlan
from ..checkpoints.headers import read_headers
from ..checkpoints.names import compress_names, expand_names
from ..config import QUANT_METHOD, QuipConfig
from ..hub import origin
from ..nn import collectives, replace
from ..nn.place import place_all, restore_structure
from ..quantize.bars import LoadingBar
from ..quantize.plan import QuantizationPlan, make_plan, unmatched_patterns
from . import resizing, saving
from .foreign import ForeignConfig, RaisedLater, RepackingConverter, check_plan, names_in_model, plan_for, recognise_foreign
from .source import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..quantize.recipe import QuantizationReport

logger = logging.getLogger(__name__)


class QuipQuantizer(HfQuantizer):
    """Quantizes a model while or after it is loaded, or prepares a model for its quantized weights.

    Three ways, by the config and by what is loaded:
        a quantized folder (`pre_quantized`): empty quantized linears are put in place before the weights are read; of a
        checkpoint of another package, each is re-packed as it is read (`repacking`), and the config becomes the native one;
        `dataset=None`: each weight is quantized as it is read, so that the dense model never exists as a whole;
        else: the model is loaded dense and then calibrated and quantized block by block.

    Attributes:
        report: after a calibrated run, what was done to each module (`quantize.recipe.QuantizationReport`); else None.
    """

    requires_calibration = False
    quantization_config: QuipConfig

    def __init__(self, quantization_config: QuipConfig, **kwargs: Any):
        # A copy: what is recorded about this model does not belong into the caller's config.
        super().__init__(quantization_config.__deepcopy__({}), **kwargs)
        self.report: QuantizationReport | None = None
        self._to_quantize: set[str] = set()
        self._bar = LoadingBar(())
        self._true_bits: float | None = None
        self._loading: tuple[PreTrainedModel, list[str]] | None = None
        self._memory = memory.PageReleaser()
        self._foreign: ForeignPlan | None = None
        self._calibration_data: tuple[torch.Tensor, str] | None = None

    @property
    def while_loading(self) -> bool:
        """Whether each weight is quantized as it is read."""
        return not self.pre_quantized and not self.quantization_config.is_calibrated

    # Before loading

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work before anything is loaded. Called again with the device map that "auto" becomes."""
        config = self.quantization_config
        config.validate()
        if config.foreign is not None:
            return
        if self.pre_quantized and config.quantized_modules is None:
            raise ValueError(
                "The quantization_config of this model names no quantized_modules, so it was not saved by "
                "transformers-quip after quantizing: quantize the original model, or restore its config.json"
            )
        if self.pre_quantized or self.while_loading or not isinstance(device_map, dict):
            return
        devices = {d if d in ("cpu", "disk") else "accelerator" for d in map(str, device_map.values())}
        if "disk" in devices or len(devices) > 1:
            raise ValueError(
                f"The device_map offloads parts of the model (to {sorted(set(map(str, device_map.values())))}), but "
                f"calibration (dataset={config.to_dict()['dataset']!r}) needs it in memory: use device_map=None "
                "or 'cpu', or dataset=None, which quantizes each weight while it is loaded"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        saving.install()
        resizing.install()
        collectives.install()
        self._loading = (model, checkpoint_files or [])
        self._memory = memory.PageReleaser(checkpoint_files or [])
        parameters = self.quantization_config.foreign
        if parameters is None and self.quantization_config.quantized_modules is None:
            parameters = getattr(model.config, "quip_params", None)
        if os.path.isdir(model.config.name_or_path):
            check_inside(model.config.name_or_path, checkpoint_files or [])
        if parameters is not None:
            files = Files(checkpoint_files or [])
            self._foreign = plan_for(model, parameters, files)
            self.quantization_config, self.pre_quantized = self._foreign.config, True
            self._put_empty_linears(model)
            check_plan(model, self._foreign, files)
            return
        if self.pre_quantized:
            self._put_empty_linears(model)
            return
        config = self.quantization_config
        if config.is_calibrated:
            _check_causal(model)
        plan = make_plan(model, config)
        if config.is_calibrated and not is_written_by_the_model(config):
            with torch.device("cpu"):  # the model is made on the meta device, and this is no part of it
                self._calibration_data = load_token_ids(config, model, source=source_of(model))
        self._true_bits = plan.true_bits
        self._to_quantize = set(plan.names)
        self._bar = LoadingBar(plan.names)
        self._report(model, plan)

    def _put_empty_linears(self, model: PreTrainedModel) -> None:
        recorded = self.quantization_config.quantized_modules
        place_all(model, expand_names(recorded), self.quantization_config)
        if not replace.quantized_modules(model):
            raise ValueError(
                f"None of the quantized modules that config.json names exists in {type(model).__name__} "
                f"(the first is {next(expand_names(sorted(recorded)), 'missing')[:80]}): is this another architecture?"
            )

    def _report(self, model: PreTrainedModel, plan: QuantizationPlan) -> None:
        config = self.quantization_config
        logger.info(f"{type(model).__name__}: {plan.summary()}")
        for pattern in unmatched_patterns(model, config):
            logger.warning(f"No module of {type(model).__name__} matches {pattern!r} of the quantization_config")
        if not config.is_calibrated and config.bits < 3:
            logger.warning(
                f"dataset=None at {config.bits} bits: without calibration the model will be badly damaged (measured: "
                "perplexities hundreds of times the dense model's). The default, dataset='self', needs no data."
            )

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Called with the renamings between the checkpoint and the model: now the checkpoint can be checked."""
        model, files = self._loading
        self._loading = None
        if self._foreign is not None:
            return [RepackingConverter(self._foreign, self._memory), *weight_conversions]
        if files and (self.pre_quantized or all(str(file).endswith(".safetensors") for file in files)):
            if self.pre_quantized:
                self._check_native(model, files, weight_conversions)
            else:
                headers = names_in_model(model, read_headers(files), weight_conversions)
                self._leave_dense(native.check_sources(sorted(self._to_quantize), headers))
        return weight_conversions

    def _leave_dense(self, new: list[str]) -> None:
        """Modules without a weight in the checkpoint, which Transformers initialises at random."""
        if not new or self.quantization_config.is_calibrated:
            return
        logger.warning(f"{', '.join(new)}: not in the checkpoint, so initialised at random and left dense")
        self._to_quantize -= set(new)
        self._bar = LoadingBar(self._to_quantize)

    def _check_native(self, model: PreTrainedModel, paths: list[str], conversions: list) -> None:
        native.check_kind(paths)
        files = Files(paths)
        names = names_in_model(model, files.headers, conversions, whole=True)
        modules = replace.quantized_modules(model)
        kinds = (replace.is_dense_linear, replace.is_dense_embedding)
        dense = [name for name, module in model.named_modules() if any(kind(module) for kind in kinds)]
        native.check_tensors(modules, dense, names)
        check_complete(model, names)
        check_finite(modules, names, files.read)
        check_small_finite(model, names, files.read)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """su, sv and everything dense have the model's dtype, whichever floating type that is."""
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type in which a tensor is read: its own where it is re-packed."""
        return None if isinstance(converter, RepackingConverter) else super().get_new_dtype(converter, param, dtype)

    # While loading

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is a weight to quantize as it is read."""
        return self.while_loading and param_name.removesuffix(".weight") in self._to_quantize

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element that a parameter will have, for device_map="auto"."""
        if self.param_needs_quantization(model, param_name):
            return self._true_bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        """What Transformers' loader calls with each weight that needs quantization."""
        return QuantizeWeight(self.quantization_config, self._memory, self._bar)

    def get_weight_conversions(self) -> list:
        """None: a native checkpoint has the names of the model."""
        return []

    # After loading

    @torch.inference_mode(False)
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        replace.leave_inference_mode(model)
        if not self.pre_quantized:
            if self.while_loading:
                self._check_all_quantized(model)
            else:
                self._calibrate(model)
            names = compress_names(replace.quantized_modules(model))
            config = self.quantization_config.without_data()
            config.quantized_modules = names
            config.settle_modules(replace.quantized_modules(model))
            config.origin = origin.describe(model.name_or_path)
            self.quantization_config = model.config.quantization_config = config
        if self._foreign is not None and hasattr(model.config, "quip_params"):
            del model.config.quip_params  # what is saved from now on is native
        self._foreign = None
        replace.freeze(model)
        replace.pack(model)
        return model

    def _calibrate(self, model: PreTrainedModel) -> None:
        from ..quantize.recipe import quantize_model

        self.report = quantize_model(model, self.quantization_config, data=self._calibration_data)
        self.quantization_config = self.report.config
        self._calibration_data = None
        if not replace.quantized_modules(model):
            raise ValueError(f"{type(model).__name__} was calibrated, but no linear layer was quantized")

    def _check_all_quantized(self, model: PreTrainedModel) -> None:
        missed = sorted(self._to_quantize - replace.quantized_modules(model).keys())
        if missed:
            raise ValueError(
                f"{len(missed)} weights that were to be quantized were not in the checkpoint: {', '.join(missed[:4])}"
            )

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # config.dtype, after save_pretrained
            dtype = getattr(torch, dtype)
        replace.replace_by_dense(model, dtype)
        restore_structure(model)
        if dtype is not None and dtype != model.dtype:
            nn.Module.to(model, dtype)  # a dense layer of another dtype than its neighbours could not run
            model.config.dtype = dtype
        return model

    # What Transformers asks

    def is_serializable(self) -> bool:
        """Yes: see `checkpoints.native`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the frozen weights can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the forward of a static cache: the ops have fakes and derivatives."""
        return True


class QuantizeWeight(ConversionOps):
    """Quantizes one weight as the loader has read it, and puts the quantized module in the place of the dense one."""

    def __init__(self, config: QuipConfig, releaser: memory.PageReleaser, bar: LoadingBar):
        self.config = config
        self.releaser = releaser
        self.bar = bar

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn {…: weight} into the tensors of the quantized module by their full names."""
        from ..quantize.embedding import quantize_embedding
        from ..quantize.layer import quantize_weight

        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        quantize = quantize_embedding if replace.is_dense_embedding(linear) else quantize_weight
        try:
            quantized = quantize(replace.dense_weight(linear, weight), self.config.for_module(name), name)
        except Exception as error:
            return RaisedLater(error)
        self.bar.advance(name, quantized.statistics["relative_error"])
        module = replace.replace_by_empty(model, name, self.config)
        missing_keys.discard(full_layer_name)
        self.releaser.handled(weight.nbytes)
        values = {**quantized.tensors, "su": quantized.su, "sv": quantized.sv}
        module.resize_stored({key: value.shape for key, value in values.items()})
        return {
            f"{name}.{key}": value.to(device=weight.device, dtype=getattr(module, key).dtype).contiguous()
            for key, value in values.items()
        }


def _check_causal(model: PreTrainedModel) -> None:
    """Calibration runs the model as a decoder on token sequences."""
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model with a generation head, so it cannot be calibrated: "
            "load it with AutoModelForCausalLM, or quantize without calibration (dataset=None)"
        )


def register() -> None:
    """Make "quip" known to Transformers, and the checkpoints of other packages that can be loaded.

    A second import of this package replaces the first one's classes.

    Raises:
        ImportError: another package has taken the name "quip".
    """
    for method, config, others in ((QUANT_METHOD, QuipConfig, False), *((name, ForeignConfig, True) for name in METHODS)):
        for mapping, kind, add in (
            (AUTO_QUANTIZATION_CONFIG_MAPPING, config, register_quantization_config),
            (AUTO_QUANTIZER_MAPPING, QuipQuantizer, register_quantizer),
        ):
            known = mapping.get(method)
            if known is None:
                add(method)(kind)
            elif (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__):
                mapping[method] = kind
            elif others:
                logger.warning(
                    f"Checkpoints of quantization method {method!r} are loaded by {known.__module__}.{known.__qualname__}, "
                    "which was registered first, and not by transformers-quip; from_pretrained(…, "
                    "quantization_config=QuipConfig()) loads them by transformers-quip"
                )
                break
            else:
                raise ImportError(
                    f"the quantization method {method!r} is taken by {known.__module__}.{known.__qualname__}: "
                    "transformers-quip cannot be used beside it"
                )
    recognise_foreign()
