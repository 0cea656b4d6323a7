"""The four ways to load a model, of which `begin` chooses one.

Transformers calls `QuipQuantizer`, which passes each call on to the mode. A mode holds facts about one
loading and not the model itself: a model holds its quantizer, so it could not be freed as soon as nobody uses it.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ..calibration.dataset import is_written, is_written_by_the_model, load_data
from ..calibration.inputs import GivenInputs
from ..checkpoints import native
from ..checkpoints.files import Files, check_inside
from ..checkpoints.headers import read_headers
from ..checkpoints.memory import PageReleaser
from ..checkpoints.names import compress_names
from ..config import QuipConfig
from ..config.tune import TuneOptions
from ..finetune.recipe import held_out_windows, quantize_and_tune
from ..hub import origin
from ..memory import free_memory
from ..nn import replace
from ..quantize.bars import LoadingBar
from ..quantize.plan import QuantizationPlan, make_plan, unmatched_patterns
from ..quantize.tensor_parallel import settle_transforms
from ..text import size as in_words
from .foreign import RepackingConverter, check_plan, plan_for
from .loader import names_in_model
from .native import check_native, place_native
from .quantize_weight import QuantizeWeight
from .source import may_be_resized, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..quantize.recipe import QuantizationReport

logger = logging.getLogger(__name__)


def begin(model: PreTrainedModel, config: QuipConfig, pre_quantized: bool, files: Sequence[str]) -> Mode:
    """Choose the mode for this model, and do all work that comes before the weights are read.

    Args:
        model: dense, on the meta device.
        config: of the caller or of the checkpoint.
        pre_quantized: whether the checkpoint says that it is quantized.
        files: the checkpoint's files of weights.

    Raises:
        ValueError: the model cannot be quantized or loaded in this way.
    """
    parameters = config.foreign
    if parameters is None and config.quantized_modules is None:
        parameters = getattr(model.config, "quip_params", None)
    if os.path.isdir(model.config.name_or_path):
        check_inside(model.config.name_or_path, files)
    if parameters is not None:
        return Repacked(model, parameters, files)
    if pre_quantized:
        return Prequantized(model, config, files)
    return (Calibrated if config.is_calibrated else WhileLoading)(model, config, files)


class Mode:
    """One way to load a model; its methods are called in their order.

    Attributes:
        config: the description of the loaded model.
        pre_quantized: whether the files hold quantized weights.
    """

    pre_quantized = False

    def __init__(self, model: PreTrainedModel, config: QuipConfig, files: Sequence[str]):
        self.config = config
        self._files = list(files)
        self._reference = weakref.ref(model)

    @property
    def _model(self) -> PreTrainedModel:
        model = self._reference()
        if model is None:
            raise RuntimeError("the model that was being loaded is gone")
        return model

    def conversions(self, rules: list) -> list:
        """Transformers' renamings for this model with the additions of this mode. The files are checked with them."""
        raise NotImplementedError

    def bits_of(self, name: str) -> float | None:
        """The true bits per weight of this weight, if it is quantized while it is read; else None."""
        return None

    def is_quantized(self, name: str) -> bool:
        """Whether the loader has to call the operation with the tensor of which this is the first weight."""
        return False

    def operation(self) -> ConversionOps:
        """The operation that the loader calls with each weight for which [`is_quantized`]."""
        raise NotImplementedError

    def finish(self, model: PreTrainedModel) -> QuantizationReport | None:
        """All weights are read: do the rest. A calibrated run returns its report."""
        return None


class Prequantized(Mode):
    """A quantized checkpoint: empty quantized linears are put in place before their tensors are read."""

    pre_quantized = True

    def __init__(self, model: PreTrainedModel, config: QuipConfig, files: Sequence[str]):
        super().__init__(model, config, files)
        place_native(model, config)

    def conversions(self, rules: list) -> list:
        """See [`Mode.conversions`]: the files must hold every tensor of the model, each in its shape and finite."""
        if not self._files:
            return rules
        native.check_kind(self._files)
        check_native(self._model, Files(self._files), rules, may_be_resized())
        return rules


class Repacked(Prequantized):
    """A checkpoint of another package: each linear is re-packed as it is read, and the config becomes the native one."""

    def __init__(self, model: PreTrainedModel, parameters: dict[str, Any], files: Sequence[str]):
        self._source = Files(files)
        self._plan = plan_for(model, parameters, self._source)
        super().__init__(model, self._plan.config, files)
        check_plan(model, self._plan, self._source)

    def conversions(self, rules: list) -> list:
        """See [`Mode.conversions`]: the linears' tensors go to the converter that re-packs them."""
        return [RepackingConverter(self._plan, PageReleaser(self._files)), *rules]

    def finish(self, model: PreTrainedModel) -> None:
        """See [`Mode.finish`]: from now on the model is saved in the native format."""
        self._source.close()
        if hasattr(model.config, "quip_params"):
            del model.config.quip_params


class _Planned(Mode):
    """A dense checkpoint: the plan says which modules are quantized, before any weight is read."""

    def __init__(self, model: PreTrainedModel, config: QuipConfig, files: Sequence[str]):
        super().__init__(model, config, files)
        self.plan: QuantizationPlan = make_plan(model, config)
        self.config = settle_transforms(model, config, self.plan)
        self._weights = {entry.name: entry.weight for entry in self.plan.entries if entry.quantized}

    def conversions(self, rules: list) -> list:
        """See [`Mode.conversions`]: every weight that is going to be quantized must be in the files."""
        if self._files and all(str(file).endswith(".safetensors") for file in self._files):
            headers = names_in_model(self._model, read_headers(self._files), rules)
            self._leave_dense(native.check_sources(dict(sorted(self._weights.items())), headers))
        return rules

    def _leave_dense(self, new: list[str]) -> None:
        """Modules without a weight in the checkpoint, which Transformers initialises at random: no mode needs to know."""

    def _record(self, model: PreTrainedModel) -> None:
        self.config = recorded(model, self.config)


def recorded(model: PreTrainedModel, config: QuipConfig) -> QuipConfig:
    """The config with a record of the modules of this model that are quantized, and of the model that it was made from."""
    quantized = replace.quantized_names(model)
    config = config.without_data()
    config.quantized_modules = compress_names(quantized)
    config.settle_modules(quantized)
    config.origin = origin.describe(model.name_or_path)
    return config


def tell_plan(model: PreTrainedModel, config: QuipConfig, plan: QuantizationPlan) -> None:
    """Log the modules to quantize, and patterns that do not match any module."""
    logger.info(f"{type(model).__name__}: {plan.summary()}")
    warning = plan.coverage_warning()
    if warning:
        logger.warning(f"{type(model).__name__}: {warning}")
    for pattern in unmatched_patterns(model, config):
        logger.warning(f"No module of {type(model).__name__} matches {pattern!r} of the quantization_config")
    if not config.is_calibrated and config.bits < 3:
        logger.warning(
            f"dataset=None at {config.bits} bits: without calibration the model will be badly damaged (measured: "
            "perplexities hundreds of times the dense model's). The default, dataset='self', needs no data."
        )


def check_fits(model: PreTrainedModel, device_map: Any = None) -> None:
    """Refuse to calibrate a dense model that is larger than the free memory, before it is loaded.

    Args:
        model: dense, on the meta device.
        device_map: of `from_pretrained`; all devices in it count.

    Raises:
        ValueError: it is larger; the message has the command that holds one block at a time.
    """
    names = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    if names & {"auto", "balanced", "balanced_low_0", "sequential"}:
        names = {"cpu", *range(torch.cuda.device_count())}
    devices = {torch.device("cuda", name) if isinstance(name, int) else torch.device(name) for name in names}
    size, free = sum(parameter.nbytes for parameter in model.parameters()), sum(map(free_memory, devices))
    if size > free:
        raise ValueError(
            f"{type(model).__name__} takes {in_words(size)} densely, and {in_words(free)} of memory are free. "
            f"`transformers-quip quantize {model.name_or_path or 'MODEL'} OUT` (transformers_quip.quantize) holds one "
            "block at a time and makes the same model"
        )


def check_can_be_calibrated(model: PreTrainedModel, config: QuipConfig) -> None:
    """Raise `ValueError` for options that need a causal language model, if this is not one."""
    encodes = getattr(model.config, "is_encoder_decoder", False)
    if model.can_generate() and not encodes:
        return
    if is_written_by_the_model(config):
        raise ValueError(
            f"{type(model).__name__} cannot be calibrated on text that it writes itself (dataset='self', the default): it "
            "is not a causal language model. Give texts, token ids or a list of the model's own arguments as dataset, or "
            "quantize without calibration (dataset=None)"
        )
    if TuneOptions.parse(config.tune).mode != "none":
        raise ValueError(f"tune={config.tune!r} needs a causal language model, and {type(model).__name__} is not one")
    if config.is_mixed and encodes:
        raise ValueError(
            f"bits={config.bits} is an average, which is chosen for causal language models: choose bits that a codebook "
            f"has for {type(model).__name__}, or set bits for patterns of names in `modules`"
        )


def check_is_causal(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that is calibrated in memory alone, because it is not a causal language model."""
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot be calibrated from folder to folder: it is not a causal language model with a "
            "generation head. Load it with from_pretrained(…, quantization_config=…), or quantize without calibration "
            "(dataset=None)"
        )


class WhileLoading(_Planned):
    """No calibration: each weight is quantized as it is read, so that the dense model never exists as a whole."""

    def __init__(self, model: PreTrainedModel, config: QuipConfig, files: Sequence[str]):
        super().__init__(model, config, files)
        tell_plan(model, config, self.plan)
        self._split: list[list[str]] = []
        stacks = {name: stack for name, stack in replace.dense_stacks(model).items() if name in self._weights}
        weights = {weight: name for name, weight in self._weights.items()}
        self._operation = QuantizeWeight(self.config, weights, stacks, PageReleaser(files), LoadingBar(self.plan.names))

    def _leave_dense(self, new: list[str]) -> None:
        if new:
            logger.warning(f"{', '.join(new)}: not in the checkpoint, so initialised at random and left dense")
            self._weights = {name: weight for name, weight in self._weights.items() if name not in new}
            self._operation.bar = LoadingBar(self._weights)

    def conversions(self, rules: list) -> list:
        """See [`Mode.conversions`]."""
        self._split = [rule.target_patterns for rule in rules if len(getattr(rule, "target_patterns", ())) > 1]
        return super().conversions(rules)

    def is_quantized(self, name: str) -> bool:
        """See [`Mode.is_quantized`]."""
        if self.bits_of(name) is not None:
            return True
        # the loader asks for the first of the weights that one tensor is split into
        others = [name.replace(first, other) for first, *rest in self._split if first in name for other in rest]
        return any(self.bits_of(other) is not None for other in others)

    def bits_of(self, name: str) -> float | None:
        """See [`Mode.bits_of`]."""
        wanted = self._weights.get(name) == name or self._weights.get(name.removesuffix(".weight")) == name
        return self.plan.true_bits if wanted else None

    def operation(self) -> ConversionOps:
        """See [`Mode.operation`]."""
        return self._operation

    def finish(self, model: PreTrainedModel) -> None:
        """See [`Mode.finish`]. Raises `ValueError` if a weight that was to be quantized never came."""
        missed = sorted(self._weights.keys() - set(self._operation.done))
        if missed:
            raise ValueError(
                f"{len(missed)} weights that were to be quantized were not in the checkpoint: {', '.join(missed[:4])}"
            )
        self._record(model)


class Calibrated(_Planned):
    """The model is loaded dense, and then calibrated and quantized block by block."""

    def __init__(self, model: PreTrainedModel, config: QuipConfig, files: Sequence[str]):
        check_can_be_calibrated(model, config)
        super().__init__(model, config, files)
        self._data: tuple[torch.Tensor | GivenInputs, str] | None = None
        if not is_written(config):
            with torch.device("cpu"):  # the model is made on the meta device, and this is not a part of it
                self._data = load_data(config, model, source=source_of(model), held_out=held_out_windows(config))
            options = TuneOptions.parse(config.tune)
            if options.tunes_vectors:
                options.check_windows(len(self._data[0]))
        tell_plan(model, config, self.plan)

    def finish(self, model: PreTrainedModel) -> QuantizationReport:
        """See [`Mode.finish`]."""
        report = quantize_and_tune(model, self.config, data=self._data)
        self.config = report.config
        if not replace.quantized_modules(model):
            raise ValueError(f"{type(model).__name__} was calibrated, but no linear layer was quantized")
        self._record(model)
        return report
