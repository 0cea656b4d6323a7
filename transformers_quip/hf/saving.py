"""Write a model card, and tensors under names that are read again, when Transformers saves or pushes a quantized model.

Transformers has no hook for either, so `patches` wraps two methods of `PreTrainedModel` and a function with these.
For a model that is not quantized by this package they behave as before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import QUANT_METHOD
from ..hub.model_card import CARD, remove_stale_card, try_to_write_card
from .loader import names_that_would_change
from .replacing import replaced_model


def save_pretrained(original: Callable) -> Callable:
    """Writes the card of a quantized model, and removes one that no longer fits."""

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> Any:
        if is_main_process and _is_quantized(self) and _is_saved_alone(self, save_directory, args, kwargs):
            with replaced_model(Path(save_directory)) as folder:
                result = original(self, folder, is_main_process, *args, **kwargs)
        else:
            result = original(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process and _is_whole(self, save_directory):
            if _is_quantized(self):
                try_to_write_card(save_directory)
            else:
                remove_stale_card(save_directory)
        return result

    return save_pretrained


def revert_weight_conversion(original: Callable) -> Callable:
    """Leaves tensors of quantized modules alone that would not come back under their names, or not as they are."""

    def revert_weight_conversion(model: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not _is_quantized(model):
            return original(model, state_dict)
        kept = names_that_would_change(model, state_dict)
        rest = {name: tensor for name, tensor in state_dict.items() if name not in kept}
        return {**original(model, rest), **{name: state_dict[name] for name in kept}}

    return revert_weight_conversion


def upload_modified_files(original: Callable) -> Callable:
    """Replaces the card that Transformers would upload by the card of the quantized model."""

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: Any, *args: Any, **kwargs: Any
    ) -> Any:
        whole = _is_quantized(self) and _is_whole(self, working_dir)
        # Here Transformers has put the card that the Hub has, or its own form, into the folder.
        if whole and try_to_write_card(working_dir, repo_id=repo_id):
            files_timestamps = {name: time for name, time in files_timestamps.items() if name != CARD}
        return original(self, working_dir, repo_id, files_timestamps, *args, **kwargs)

    return _upload_modified_files


def _is_whole(model: Any, folder: Any) -> bool:
    """Whether the whole model is saved in this folder, not its adapters alone."""
    return not getattr(model, "_hf_peft_config_loaded", False) and (Path(folder) / "config.json").is_file()


def _is_saved_alone(model: Any, folder: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether this process alone saves a whole model, to a folder and nowhere else.

    Args:
        args, kwargs: of `save_pretrained`, behind `is_main_process`.
    """
    given = dict(zip(("state_dict", "push_to_hub"), args, strict=False)) | kwargs
    if given.get("push_to_hub") or kwargs.get("variant") or kwargs.get("distributed_checkpoint"):
        return False
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several and not getattr(model, "_hf_peft_config_loaded", False) and not Path(folder).is_file()


def _is_quantized(model: Any) -> bool:
    """Whether it is quantized by this package."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "quant_method", None) == QUANT_METHOD
