"""Where a quantized model came from: recorded in its config.json when it is quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..version import __version__

# A model in the client's cache lies in .../models--owner--name/snapshots/commit.
_CACHED = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)[/\\]snapshots")


def describe(name_or_path: str) -> dict[str, Any]:
    """Which dense model was quantized, by which versions.

    Args:
        name_or_path: as it was given to `from_pretrained`.

    Returns:
        "base_model": its id on the Hub; or "folder": the last part of its path (the whole path is private);
        neither without a name. "versions": of transformers_quip, transformers and torch.
    """
    versions = {"transformers_quip": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    repo_id = find_repo_id(name_or_path)
    if repo_id is not None:
        return {"base_model": repo_id, "versions": versions}
    folder = Path(name_or_path).name if name_or_path else ""
    return {**({"folder": folder} if folder else {}), "versions": versions}


def find_repo_id(name_or_path: str) -> str | None:
    """The id on the Hub that a name, or a path in the client's cache, stands for; None for any other folder."""
    cached = _CACHED.search(name_or_path)
    if cached:
        return f"{cached['owner']}/{cached['name']}"
    if not name_or_path or Path(name_or_path).exists():
        return None
    try:
        validate_repo_id(name_or_path)
    except HFValidationError:
        return None
    return name_or_path
