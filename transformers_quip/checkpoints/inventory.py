"""The content of a saved model, read from its config.json and the headers of its safetensors files.

No tensor is read and PyTorch is not imported, so a model of any size, local or on the Hub, is described at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .headers import DAMAGED, TensorInfo, check_is_there, read_headers, read_json, type_bytes

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The tensors that every stored linear has, besides its bias.
_MARKS = ("codes", "su", "sv")


@dataclass(frozen=True)
class StoredLinear:
    """One quantized linear of a checkpoint, or one projection of all experts of a mixture.

    Attributes:
        name: of the module, or of the projection.
        out_features, in_features: m and n; the larger sizes m', n' of a padded linear (see `config.storage.Storage`).
        codes_bytes: bytes of all integer tensors stored for the weight.
        bytes: of all tensors stored for the weight (without the bias).
        tensors: their names.
        experts: the number of matrices of these sizes that are stored together; 1 for a linear.
    """

    name: str
    out_features: int
    in_features: int
    codes_bytes: int
    bytes: int
    tensors: tuple[str, ...] = ()
    experts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), or (experts, m, n)."""
        sizes = (self.out_features, self.in_features)
        return sizes if self.experts == 1 else (self.experts, *sizes)

    @property
    def weights(self) -> int:
        """m·n, times the number of experts."""
        return self.experts * self.out_features * self.in_features

    @property
    def true_bits(self) -> float:
        """Bits per weight, counting all tensors stored for it."""
        return 8 * self.bytes / self.weights

    @property
    def code_bits(self) -> float:
        """Bits per weight of the codes alone."""
        return 8 * self.codes_bytes / self.weights


@dataclass(frozen=True)
class Inventory:
    """A saved model as its config and its headers describe it.

    Attributes:
        config: the content of config.json.
        tensors: every tensor by name; empty where only an index is there.
        linears: the quantized ones in the native format.
        total_bytes: of all tensors.
        names: of all tensors, also where only an index is there.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    linears: tuple[StoredLinear, ...]
    total_bytes: int
    names: tuple[str, ...]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The quantization_config; empty for a dense model."""
        return _quantization(self.config)

    @property
    def has_headers(self) -> bool:
        """Whether shapes are known, not only names."""
        return bool(self.tensors)

    @property
    def quantized_weights(self) -> int:
        """Σ m·n over the quantized linears."""
        return sum(linear.weights for linear in self.linears)

    @property
    def parameters(self) -> int:
        """Number of parameters of the dense model, as far as they are stored (a tied weight counts once)."""
        return self.quantized_weights + sum(tensor.elements for tensor in self._dense().values())

    @property
    def true_bits(self) -> float:
        """Bits per quantized weight, counting all tensors stored for it.

        Raises:
            ValueError: the checkpoint has no quantized linear in the native format.
        """
        if not self.linears:
            raise ValueError("the checkpoint has no linear layer quantized in the native format")
        return 8 * sum(linear.bytes for linear in self.linears) / self.quantized_weights

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense model in the same dtype."""
        size = type_bytes(str(self.config.get("dtype") or self.config.get("torch_dtype"))) or 2
        return self.quantized_weights * size + sum(tensor.bytes for tensor in self._dense().values())

    def cache_bytes(self, tokens: int) -> int | None:
        """The key-value cache for one sequence of this many tokens in a 16-bit dtype; None if the config does not tell.

        Layers with a sliding window need less than this.
        """
        inner = self.config.get("text_config")
        config = {**self.config, **inner} if isinstance(inner, Mapping) else self.config

        def first(*names: str) -> int | None:
            return next((config[name] for name in names if _is_size(config.get(name))), None)

        layers = first("num_hidden_layers", "n_layer")
        heads = first("num_attention_heads", "n_head")
        hidden = first("hidden_size", "n_embd")
        if not layers or not heads or not hidden:
            return None
        size = first("head_dim") or hidden // heads
        return 2 * layers * (first("num_key_value_heads") or heads) * size * 2 * tokens

    def _dense(self) -> dict[str, TensorInfo]:
        """The tensors that do not stand for a quantized weight."""
        quantized = {name for linear in self.linears for name in linear.tensors}
        return {name: tensor for name, tensor in self.tensors.items() if name not in quantized}


def read_folder(folder: str | Path) -> Inventory:
    """The inventory of a folder that `save_pretrained` wrote, or of a config.json and an index alone.

    Raises:
        ValueError: a file is missing, or its content does not fit its name.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # as Transformers reads it: whatever else is there
        files = [single]
    elif index.is_file():
        content = read_json(index)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map")
        names = {name for name in weight_map.values() if isinstance(name, str)}
        outside = [name for name in weight_map.values() if not isinstance(name, str)]
        outside += [name for name in names if not _is_file_name(name)]
        if outside:
            raise ValueError(
                f"{index} names the file {str(outside[0])[:80]!r}, which is not a file of this folder: {DAMAGED}"
            )
        files = sorted({folder / name for name in names})
        missing = [file for file in files if not file.is_file()]
        if missing and len(missing) < len(files):
            raise ValueError(f"{missing[0]} is missing ({len(missing)} of {len(files)} files): download the model again")
        if missing:
            metadata = content.get("metadata")
            size: Any = metadata.get("total_size") if isinstance(metadata, Mapping) else None
            if not _is_size(size, 2**63):
                raise ValueError(f"{index} says no total_size, and none of the files that it names is here")
            return Inventory(config, {}, (), size, tuple(weight_map))
    else:
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} has neither {SINGLE} nor {INDEX}, and no other format is read: convert the model first"
            )
    return make_inventory(config, read_headers(files))


def read_repo(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Inventory:
    """The inventory of a model on the Hub; of its weights only the headers are fetched.

    Raises:
        ValueError: it has no safetensors files.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    check_is_there(repo_id)
    from huggingface_hub.errors import NotASafetensorsRepoError

    if constants.HF_HUB_OFFLINE:
        needed = [CONFIG, "*.safetensors", INDEX]  # the cache need not have more
        return read_folder(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=needed))
    api = HfApi(token=token)
    revision = api.model_info(
        repo_id, revision=revision
    ).sha  # raises, if this user may not see it, whatever the cache holds
    config = read_json(Path(hf_hub_download(repo_id, CONFIG, revision=revision, token=token)))
    try:
        metadata = api.get_safetensors_metadata(repo_id, revision=revision)
    except NotASafetensorsRepoError as error:
        raise ValueError(f"{repo_id} has no safetensors files, and transformers-quip reads no other format") from error
    tensors = {
        name: TensorInfo(tuple(info.shape), info.dtype, key=name)
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return make_inventory(config, tensors)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"the quantization_config of {CONFIG} is not a JSON object: {DAMAGED}")
    return found


def _is_size(value: Any, limit: int = 2**40) -> bool:
    """Whether this is a positive integer that a model can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < limit


def _is_file_name(name: str) -> bool:
    """Whether this names a file of a folder, and nothing outside it."""
    if not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def make_inventory(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Inventory:
    """Find the quantized linears among the tensors.

    Raises:
        ValueError: a quantized linear is incomplete.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        modules.setdefault(module, {})[kind] = tensor
    native = "format_version" in _quantization(config)
    linears = tuple(found for name, parts in modules.items() if native for found in _linears(name, parts))
    total = sum(tensor.bytes for tensor in tensors.values())
    return Inventory(config, tensors, linears, total, tuple(tensors))


def _linears(name: str, parts: Mapping[str, TensorInfo]) -> Iterator[StoredLinear]:
    """The quantized weights of a module: its own, or the stacks of its experts."""
    if "codes" in parts:
        yield _linear(name, {kind: (f"{name}.{kind}", tensor) for kind, tensor in parts.items()})
    for stack in [kind.removesuffix("_codes") for kind in parts if kind.endswith("_codes")]:
        prefix = f"{stack}_"
        own = {kind.removeprefix(prefix): (f"{name}.{kind}", t) for kind, t in parts.items() if kind.startswith(prefix)}
        yield _linear(f"{name}.{stack}", own, stacked=True)


def _linear(name: str, parts: Mapping[str, tuple[str, TensorInfo]], stacked: bool = False) -> StoredLinear:
    missing = [mark for mark in _MARKS if mark not in parts or not parts[mark][1].elements or not parts[mark][1].shape]
    missing = missing or [mark for mark in ("su", "sv") if stacked and len(parts[mark][1].shape) != 2]
    if missing:
        raise ValueError(f"{name} has codes, but has no {missing[0]}: {DAMAGED}")
    su, sv = parts["su"][1].shape, parts["sv"][1].shape
    own = {full: tensor for kind, (full, tensor) in parts.items() if kind != "bias"}
    codes = sum(tensor.bytes for tensor in own.values() if tensor.dtype.startswith(("I", "U")))
    everything = sum(tensor.bytes for tensor in own.values())
    return StoredLinear(name, sv[-1], su[-1], codes, everything, tuple(own), sv[0] if stacked else 1)
