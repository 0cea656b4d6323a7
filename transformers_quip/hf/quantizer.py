"""QuipQuantizer: Transformers' hooks, each a few lines that call into `modes`.

This file is imported while Transformers itself is being imported, so the hooks import everything that needs
Transformers' models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer

from ..config import QuipConfig
from . import methods

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import ConversionOps

    from ..quantize.recipe import QuantizationReport
    from .modes import Mode


class QuipQuantizer(HfQuantizer):
    """Quantizes a model while or after it is loaded, or prepares a model for its quantized weights.

    `modes` has the ways to do that, and chooses one when the model has been built:
        a quantized folder (`pre_quantized`): empty quantized linears are put in place before the weights are read; of a
        checkpoint of another package, each is re-packed as it is read, and the config becomes the native one;
        `dataset=None`: each weight is quantized as it is read, so that the dense model never exists as a whole;
        else: the model is loaded dense and then calibrated and quantized block by block.

    Attributes:
        report: after a calibrated run, the record of each module (`quantize.recipe.QuantizationReport`); else None.
    """

    requires_calibration = False
    quantization_config: QuipConfig
    pre_quantized: bool

    def __init__(self, quantization_config: QuipConfig, **kwargs: Any):
        # A copy: records about this model do not belong into the caller's config.
        super().__init__(quantization_config.__deepcopy__({}), **kwargs)
        self.report: QuantizationReport | None = None
        self._mode: Mode | None = None
        self._shapes: dict[str, torch.Size] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a model is already loaded."""
        return {**self.__dict__, "_mode": None}

    # Before loading

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse combinations that cannot work, before anything is loaded.

        Called again with the device map that "auto" becomes.
        """
        config = self.quantization_config
        config.validate()
        if config.foreign is not None:
            return
        if self.pre_quantized and config.quantized_modules is None:
            raise ValueError(
                "The quantization_config of this model names no quantized_modules, so it was not saved by "
                "transformers-quip after quantizing: quantize the original model, or restore its config.json"
            )
        if self.pre_quantized:
            return
        from ..quantize.plan import check_device

        for device in device_map.values() if isinstance(device_map, dict) else [device_map]:
            check_device(device)
        if not config.is_calibrated or not isinstance(device_map, dict):
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
        from . import mismatched, modes, parallel, patches

        patches.install()
        parallel.check(model, self.quantization_config, self.pre_quantized)
        if self.quantization_config.is_calibrated and not self.pre_quantized:
            modes.check_fits(model, kwargs.get("device_map"))
        self._mode = modes.begin(model, self.quantization_config, self.pre_quantized, checkpoint_files or [])
        self.quantization_config, self.pre_quantized = self._mode.config, self._mode.pre_quantized
        self._shapes = mismatched.expected_shapes(model)

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel | None = None) -> list:
        """Called with the renamings between the checkpoint and the model: now the checkpoint can be checked."""
        return self._loading.conversions(weight_conversions)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Change Transformers' plans for several processes to what quantized modules can follow."""
        from .parallel import update_plan

        update_plan(model, plan)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """su, sv and everything dense have the model's dtype, whichever floating type that is."""
        return dtype

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type in which a tensor is read: its own type if it is re-packed."""
        from .foreign import RepackingConverter

        return None if isinstance(converter, RepackingConverter) else super().get_new_dtype(converter, param, dtype)

    # While loading

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether this is a weight to quantize as it is read."""
        return self._mode is not None and self._mode.is_quantized(param_name)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element that a parameter will have, for device_map="auto"."""
        bits = None if self._mode is None else self._mode.bits_of(param_name)
        return param.element_size() if bits is None else bits / 8

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that Transformers' loader calls with each weight that needs quantization."""
        return self._loading.operation()

    def get_weight_conversions(self) -> list:
        """None: a native checkpoint has the names of the model."""
        return []

    @property
    def _loading(self) -> Mode:
        if self._mode is None:
            raise RuntimeError("this quantizer has no model to load: its hooks are called by from_pretrained")
        return self._mode

    # After loading

    @torch.inference_mode(False)
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from ..nn import replace
        from . import mismatched

        replace.leave_inference_mode(model)
        mismatched.initialise_others(model, self._shapes)
        self.report = self._loading.finish(model)
        self.quantization_config = model.config.quantization_config = self._loading.config
        replace.freeze(model)
        replace.pack(model)
        return model

    @torch.inference_mode(False)
    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # config.dtype, after save_pretrained
            dtype = getattr(torch, dtype)
        from ..nn import replace
        from ..nn.place import restore_structure

        replace.replace_by_dense(model, dtype)
        restore_structure(model)
        if dtype is not None and dtype != model.dtype:
            torch.nn.Module.to(model, dtype)  # a dense layer whose dtype differs from its neighbours' could not run
            model.config.dtype = dtype
        return model

    # Questions of Transformers

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


methods.register()
