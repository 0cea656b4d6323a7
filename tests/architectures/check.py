"""Everything that a user does with a model, tried on a tiny random one of some architecture.

Quantize to 2 and 4 bits without calibration and to 4 bits with it, save and reload, generate, dequantize. A stage passes if
it raises nothing and its logits are finite, and equal those from before where they have to be.
"""

from __future__ import annotations

import inspect
import logging
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from tests.architectures.tiny import randomize, tiny_config
from transformers_quip import QuipConfig
from transformers_quip.nn.replace import quantized_modules

# Task → the table of Transformers that names its classes, and the class that loads them.
TASKS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "image": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "masked": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
}
STAGES = ("2 bits", "4 bits", "calibrated", "reload", "reload calibrated", "generate", "dequantize")
MOST_PARAMETERS = 8_000_000


class Untestable(Exception):
    """The dense model cannot be made, run or reloaded, so that it says nothing about this package."""


@dataclass
class Result:
    """The stages of one architecture.

    Attributes:
        task, model_type: which one.
        untestable: the reason why it was not tried; "" if it was.
        errors: stage → the error; of stages that passed "".
        share: stage → the share of weights, embeddings and head not counted, that is quantized.
        left: most of the rest by kind: name, class and share.
        warned: stage → the warnings that a user would have seen.
    """

    task: str
    model_type: str
    untestable: str = ""
    errors: dict[str, str] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    warned: dict[str, list[str]] = field(default_factory=dict)

    def passed(self, stage: str) -> bool:
        """Whether a stage was reached and passed."""
        return self.errors.get(stage) == ""

    @property
    def failed(self) -> list[str]:
        """The stages that were reached and did not pass."""
        return [stage for stage, error in self.errors.items() if error]


def model_class(task: str, model_type: str) -> type:
    """The class of a model type for a task."""
    name = getattr(modeling_auto, TASKS[task][0])[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def check(task: str, model_type: str, folder: Path, stages: tuple[str, ...] = STAGES) -> Result:
    """Try an architecture.

    Args:
        task: a key of `TASKS`.
        model_type: as Transformers calls it.
        folder: for its files.
        stages: those to try.
    """
    result = Result(task, model_type)
    try:
        expected, auto, others = _dense(task, model_type, folder / "dense")
    except Untestable as error:
        result.untestable = str(error)
        return result
    _Trial(result, folder, auto, expected, stages, others).run()
    return result


def _dense(task: str, model_type: str, folder: Path) -> tuple[torch.Tensor, Any, Callable[[int], Any] | None]:
    """Save a tiny dense model.

    Returns:
        The logits that it has after reloading, the class that loads it, and, if its main input is not token ids, a function
        that makes inputs from a seed.
    """
    try:
        cls, auto = model_class(task, model_type), getattr(transformers, TASKS[task][1])
        config = tiny_config(model_type)
        if not isinstance(config, cls.config_class):
            config = config.get_text_config(decoder=True)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls._from_config(config).parameters())
        if count > MOST_PARAMETERS:
            raise Untestable(f"{count} parameters are not tiny")
        torch.manual_seed(0)
        model = cls(config).float().eval()
        randomize(model)
        model.tie_weights()
        model.save_pretrained(folder)
        again = auto.from_pretrained(folder, dtype=torch.float32)
        expected = logits(again)
    except Untestable:
        raise
    except Exception as error:  # of any kind: the architecture itself is at fault
        raise Untestable(f"{type(error).__name__}: {_first_line(error)}") from error
    if not expected.isfinite().all() or expected.std() < 1e-6:
        raise Untestable("the dense model's logits are not finite, or constant")
    if type(again) is not cls or not _same(logits(again), expected):
        raise Untestable("the dense model is of another class after reloading, or differs from call to call")
    with torch.device("meta"):
        bare = cls._from_config(config)
    arguments = inspect.signature(bare.forward).parameters
    required = [name for name, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    on_ids = "input_ids" in inputs_for(bare) and required in ([], ["input_ids"])
    return expected, auto, None if on_ids else lambda seed: inputs_for(bare, seed)


class _Trial:
    def __init__(
        self,
        result: Result,
        folder: Path,
        auto: Any,
        expected: torch.Tensor,
        stages: tuple[str, ...],
        others: Callable[[int], Any] | None,
    ):
        self.result, self.folder, self.auto, self.expected, self.stages = result, folder, auto, expected, stages
        self.other_inputs = others
        self.models: dict[str, Any] = {}
        self.logits: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """Each stage whose models are there."""
        data: Any = [self.other_inputs(seed) for seed in (5, 6)] if self.other_inputs else token_ids(8, 5)
        tokens = {"dataset": data, "num_samples": 8, "sequence_length": 32, "batch_size": 4, "refinement_sweeps": 1}
        self._try("2 bits", lambda: self._load("2 bits", bits=2, dataset=None))
        self._try("4 bits", lambda: self._load("4 bits", bits=4, dataset=None))
        self._try("calibrated", lambda: self._load("calibrated", bits=4, **tokens))
        self._try("reload", lambda: self._reload("2 bits"), "2 bits")
        self._try("reload calibrated", lambda: self._reload("calibrated"), "calibrated")
        if "generate" in self.stages and self._dense_generates():
            self._try("generate", lambda: generated(self.models["2 bits"]), "2 bits")
        self._try("dequantize", self._dequantize, "2 bits")

    def _try(self, stage: str, function: Callable[[], Any], needs: str = "") -> None:
        if stage not in self.stages or (needs and needs not in self.models):
            return
        with _Warnings() as warned:
            try:
                function()
                self.result.errors[stage] = ""
            except Exception as error:  # of any kind: it is recorded
                self.result.errors[stage] = f"{type(error).__name__}: {_first_line(error)} [{_place(error)}]"
        if warned.seen:
            self.result.warned[stage] = warned.seen

    def _load(self, key: str, **options: Any) -> None:
        config = QuipConfig(**options)
        model = self.auto.from_pretrained(self.folder / "dense", dtype=torch.float32, quantization_config=config)
        found = logits(model)
        if not found.isfinite().all():
            raise AssertionError("logits are not finite")
        self.models[key], self.logits[key] = model, found
        self.result.share[key], left = coverage(model)
        self.result.left = self.result.left or left

    def _reload(self, key: str) -> None:
        path = self.folder / key.replace(" ", "_")
        self.models[key].save_pretrained(path)
        again, info = self.auto.from_pretrained(path, output_loading_info=True)
        if not _same(logits(again), self.logits[key]):
            raise AssertionError(f"the logits differ after reloading ({ ({k: v for k, v in info.items() if v}) })")

    def _dense_generates(self) -> bool:
        try:
            generated(self.auto.from_pretrained(self.folder / "dense", dtype=torch.float32))
        except Exception:  # of any kind: then there is nothing to compare with
            return False
        return True

    def _dequantize(self) -> None:
        model = self.models.pop("2 bits")
        model.dequantize()
        if quantized_modules(model):
            raise AssertionError("quantized modules are left")
        found = logits(model)
        if (found - self.logits["2 bits"]).norm() > 1e-3 * found.norm():
            raise AssertionError("the dequantized model differs")
        model.save_pretrained(self.folder / "back")
        if not _same(logits(self.auto.from_pretrained(self.folder / "back", dtype=torch.float32)), found):
            raise AssertionError("the dequantized model differs after reloading")


def token_ids(rows: int, seed: int) -> torch.Tensor:
    """Random token ids [rows, 32]."""
    return torch.randint(3, 100, (rows, 32), generator=torch.Generator().manual_seed(seed))


def inputs_for(model: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of the kind that the model takes: token ids, and sounds or images where it cannot do without."""
    noise, config = torch.Generator().manual_seed(seed), model.config
    encodes = getattr(config, "is_encoder_decoder", False)
    if model.main_input_name == "input_features" and encodes:
        bins, frames = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", 64) * 2
        shape = (2, bins, frames) if config.model_type == "whisper" else (2, frames, bins)
        return {"input_features": torch.randn(shape, generator=noise), "decoder_input_ids": token_ids(2, seed)}
    if model.main_input_name == "input_values" and encodes:
        return {"input_values": torch.randn(2, 3200, generator=noise), "decoder_input_ids": token_ids(2, seed)}
    if model.main_input_name == "flattened_patches":
        width = config.vision_config.patch_embed_hidden_size
        patches = torch.rand(2, 16, 2 + width, generator=noise).mul(4).round()
        return {"flattened_patches": patches, "decoder_input_ids": token_ids(2, seed)}
    if model.main_input_name == "pixel_values" and "pixel_values" in inspect.signature(model.forward).parameters:
        vision = getattr(config, "vision_config", None) or getattr(config, "encoder", config)
        size = getattr(vision, "image_size", 32)
        pixels = {"pixel_values": torch.randn(2, 3, size, size, generator=noise)}
        return pixels | {"decoder_input_ids" if encodes else "input_ids": token_ids(2, seed)}
    found = {"input_ids": token_ids(4, seed)}
    return found | {"decoder_input_ids": token_ids(4, seed + 1)} if encodes else found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """float32 logits of the inputs of [`inputs_for`]."""
    torch.manual_seed(0)  # a few models draw random numbers in their forward
    out = model.eval()(**inputs_for(model))
    value = out.logits if "logits" in out else out[0]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"the forward returns {type(out).__name__} without logits")
    return value.float()


def generated(model: Any) -> list[int]:
    """Five tokens, with a cache."""
    given = inputs_for(model)
    given.pop("decoder_input_ids", None)
    key = next(iter(given))
    torch.manual_seed(0)
    out = model.generate(**{key: given[key][:2]}, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return out[0, -5:].tolist()


def coverage(model: Any) -> tuple[float, dict[str, float]]:
    """The share of weights that is quantized, embeddings and head not counted; and what else there is, by kind."""
    done, packed = 0, set()
    for module in quantized_modules(model).values():
        packed |= {id(p) for p in module.parameters()}
        stacks = getattr(module, "stacks", None)
        done += sum(s.weights for s in stacks.values()) if stacks else module.weight.numel()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left: dict[str, int] = {}
    for name, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if id(p) not in packed and module is not head and not isinstance(module, nn.Embedding):
                packed.add(id(p))
                kind = re.sub(r"\b\d+\b", "N", f"{name}.{key}") + f" ({type(module).__name__})"
                left[kind] = left.get(kind, 0) + p.numel()
    total = done + sum(left.values())
    most = sorted(left.items(), key=lambda item: -item[1])
    return done / total, {kind: count / total for kind, count in most if count >= 0.02 * total}


class _Warnings(logging.Handler):
    """The first lines of the warnings that are logged meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        text = record.getMessage().split("\n")[0][:300]
        if text not in self.seen:
            self.seen.append(text)

    def __enter__(self) -> _Warnings:
        self.started = time.perf_counter()
        for logger in ("transformers", "transformers_quip"):
            logging.getLogger(logger).addHandler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        for logger in ("transformers", "transformers_quip"):
            logging.getLogger(logger).removeHandler(self)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:400]


def _place(error: BaseException) -> str:
    """The last line of this package, or of any, that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "transformers_quip" in frame.filename] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"
