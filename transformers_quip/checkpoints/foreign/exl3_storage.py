"""Check the codes of linears against the list of tensors that exllamav3 writes next to an EXL3 checkpoint.

A tensor without a value (`mcg`, `mul1`) tells which code a linear has, and none means a third one, so that a lost or
misspelt name makes it another code without an error. `quantization_config.json` has "tensor_storage": {module:
{"stored_tensors": {tensor: …}}}. It may be missing, and it lists the language model alone. Where somebody has put files of
several checkpoints together, the linears may have other codes than it says, but not none where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..headers import DAMAGED, TensorInfo, read_json

BESIDE = "quantization_config.json"
_CODES = ("mcg", "mul1")


def check_codes(headers: Mapping[str, TensorInfo]) -> None:
    """Check that every linear for which the list has a code has one in the files.

    Args:
        headers: the tensors of an EXL3 checkpoint by their names in the files.

    Raises:
        ValueError: a code is missing; or the list is not JSON.
    """
    folder = next((Path(info.file).parent for info in headers.values() if info.file), None)
    if folder is None or not (folder / BESIDE).is_file():
        return
    storage = read_json(folder / BESIDE).get("tensor_storage")
    for module, stored in storage.items() if isinstance(storage, dict) else ():
        listed = stored.get("stored_tensors") if isinstance(stored, dict) else None
        lost = [f"{module}.{code}" for code in _CODES if isinstance(listed, dict) and f"{module}.{code}" in listed]
        if lost and f"{module}.trellis" in headers and not any(f"{module}.{code}" in headers for code in _CODES):
            raise ValueError(f"{lost[0]} is missing, which {folder / BESIDE} lists: {DAMAGED}")
