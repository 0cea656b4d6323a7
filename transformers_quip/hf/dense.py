"""A dense checkpoint that is not loaded: its folder, its model without weights, its tokenizer, and how to know it again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ..calibration.tokenizer import first_line
from ..checkpoints.files import expand_weights, find_weights
from ..checkpoints.headers import check_is_there, read_header, read_json, torch_dtype
from ..checkpoints.sizes import check_layers
from ..config import QuipConfig
from ..version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What a repository is asked for: not the weights in other formats.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja", "*.py")
# Places of a file of weights that are compared, besides its header: fine-tunes of one model differ in their numbers alone.
_SAMPLES = 8
_OTHERS = ("original/*", "consolidated*", "onnx/*")


def dense_model(folder: Path, source: str, dtype: str | torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The dense model on the meta device, in eval mode."""
    read_json(folder / "config.json")  # its error names the file
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None or getattr(config, "quip_params", None) is not None:
        raise ValueError(f"{source} is quantized already: give the dense model")
    check_layers(config)
    kind = _dtype(dtype, config, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    model.name_or_path = model.config.name_or_path = source
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _dtype(dtype: str | torch.dtype, config: Any, folder: Path) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    if getattr(config, "dtype", None) is not None:
        return config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype)
    first = weight_files(folder)[0]
    kinds = (torch_dtype(info.dtype) for info in read_header(first).values())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def own_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of several libraries; without files some tokenizers raise a TypeError
        logger.warning("%s has no tokenizer that can be read, so none is saved (%s)", folder, first_line(error))
        return None


def local_folder(source: str | Path, access: Mapping[str, Any]) -> Path:
    """The folder of a model; one on the Hub is downloaded without weights in other formats."""
    if Path(source).is_dir():
        return Path(source)
    check_is_there(source)
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(str(source), allow_patterns=_WANTED, ignore_patterns=_OTHERS, **access))
    if find_weights(folder) is None:
        folder = Path(snapshot_download(str(source), allow_patterns=(*_WANTED, "*.bin"), ignore_patterns=_OTHERS, **access))
    return folder


def weight_files(folder: Path) -> list[str]:
    found = find_weights(folder)
    if found is None:
        raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin, nor an index of several files")
    return expand_weights(found)


def fingerprint(
    folder: Path,
    paths: list[str],
    config: QuipConfig,
    model: PreTrainedModel,
    data: tuple[torch.Tensor, str] | None,
    device: str | torch.device,
) -> dict[str, Any]:
    """All that must be the same to resume a run: source, options, text, versions and place."""
    options = {name: value for name, value in config.without_data().to_dict().items() if value is not None}
    ids = None if data is None else hashlib.sha256(data[0].numpy().tobytes()).hexdigest()
    return {
        "source": {"config.json": _digest(folder / "config.json"), **{Path(path).name: _file(path) for path in paths}},
        "options": options,
        "token ids": ids,
        "dtype": str(model.dtype),
        "device": torch.device(device).type,
        "threads": torch.get_num_threads(),
        "versions": {
            "transformers-quip": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _file(path: str) -> str:
    """The size of a file of weights, and a hash of its header and of samples: names, shapes, places and some numbers."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.endswith(".safetensors") else 0
        digest = hashlib.sha256(file.read(min(length, size)))
        for place in range(_SAMPLES):
            file.seek(size * place // _SAMPLES)
            digest.update(file.read(1 << 16))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
