"""The weights of a dense model, one at a time: from files, so that it need not fit into memory, or from the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..checkpoints.files import Files, expand_weights, find_weights
from ..checkpoints.headers import TensorInfo, check_is_there
from ..checkpoints.sizes import check_same_sizes
from ..hf.loader import names_in_model
from ..nn.replace import dense_weight


class DenseWeights:
    """The weights of the linears of a dense model by the names that its modules have.

    Args:
        dense: a folder with safetensors files, an id on the Hub, or a model in memory.
        like: a model of the same class, such as the quantized one.
        token: for the Hub.

    Raises:
        ValueError: the folder holds no weights, or those of a quantized model or of another architecture.
        OSError: there is no such folder, or the Hub cannot be reached.
    """

    def __init__(self, dense: str | os.PathLike | nn.Module, like: PreTrainedModel, token: str | None = None):
        self._files: Files | None = None
        self._tensors: dict[str, TensorInfo] = {}
        if isinstance(dense, nn.Module):
            self._model, self._source = dense, type(dense).__name__
            if isinstance(dense, PreTrainedModel):
                _check_sizes(dense.config.to_dict(), like, self._source)
            return
        folder = Path(dense)
        if not folder.is_dir():
            check_is_there(dense)
            patterns = ["*.json", "model*.safetensors"]
            folder = Path(snapshot_download(str(dense), token=token, allow_patterns=patterns))
        self._source = str(dense)
        content, _ = like.config.get_config_dict(folder)
        if content.get("quantization_config"):
            raise ValueError(f"{dense} is a quantized model: give the dense one that was quantized")
        _check_sizes(content, like, self._source)
        path = find_weights(folder)
        if path is None:
            raise ValueError(f"{dense} holds no model.safetensors or index of several files, so it has no dense weights")
        with torch.device("meta"):
            self._model = type(like)(type(like.config).from_dict(content))
        self._files = Files(expand_weights(path))
        self._tensors = names_in_model(self._model, self._files.headers, get_model_conversion_mapping(self._model))

    def weight(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """The weight [m, n] of the linear of this name, in the dtype in which it is stored, on the device where it lies.

        Args:
            name: of the module.
            shape: (m, n) that it must have.

        Raises:
            ValueError: there is none, or it has another shape.
        """
        try:
            module: Any = self._model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{self._source} has no module {name}: is it the dense model that was quantized?") from None
        weight = module.weight.detach()
        if self._files is not None:
            info = self._tensors.get(f"{name}.weight")
            if info is None or not info.as_it_is:
                raise ValueError(
                    f"{self._source} does not hold {name}.weight as one tensor: give the loaded model as `dense`"
                )
            weight = self._files.read(info)
        weight = dense_weight(module, weight)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(weight.shape)} in {self._source} and {list(shape)} in the quantized model"
            )
        return weight


def _check_sizes(content: dict[str, Any], like: PreTrainedModel, source: str) -> None:
    try:
        check_same_sizes(like.config.to_dict(), content)
    except ValueError as error:
        raise ValueError(f"{source} is not the dense model that was quantized: {error}") from None
