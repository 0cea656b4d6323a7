"""A tuning run on disk, so that a stopped run resumes.

One safetensors file holds the trained values, the state of the optimizer and the best values so far. It is written under
another name, flushed to the disk and renamed, so it is always complete. A fingerprint identifies the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..checkpoints.durable import differences, durable
from ..config.tune import TuneOptions
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FILE = "tuning.safetensors"


@dataclass
class Run:
    """The state of a run.

    Attributes:
        step: the number of finished steps.
        values, best: trained parameters by name, now and in the best state so far.
        moments: Adam's first and second moments by name.
        best_loss: on the held-out windows.
        history: see `TuneReport`.
    """

    step: int
    values: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
    best_loss: float
    history: list[dict[str, float]] = field(default_factory=list)


def fingerprint(model: PreTrainedModel, teacher: Teacher, options: TuneOptions) -> dict[str, Any]:
    """All that must be the same to resume, by name: the options, and hashes of model, text and teacher's states."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if parameter.ndim == 1 or not parameter.is_floating_point():
            digest.update(_bytes(parameter))
    return {
        "options": json.loads(json.dumps(options.to_dict())),
        "model": digest.hexdigest(),
        "text": _hash(teacher.ids),
        "states of the dense model": _hash(teacher.states[-1]),
    }


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(_bytes(tensor), digest_size=16).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def save(folder: Path, run: Run, mark: dict[str, Any]) -> None:
    """Write the run to the folder, atomically."""
    tensors = {f"value.{name}": value for name, value in run.values.items()}
    tensors |= {f"best.{name}": value for name, value in run.best.items()}
    for name, (first, second) in run.moments.items():
        tensors |= {f"first.{name}": first, f"second.{name}": second}
    about = {"fingerprint": mark, "step": run.step, "best_loss": run.best_loss, "history": run.history}
    folder.mkdir(parents=True, exist_ok=True)
    with durable(folder / FILE) as temporary:
        save_file(
            {name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, {"run": json.dumps(about)}
        )


def load(folder: Path, mark: dict[str, Any]) -> Run | None:
    """The run in the folder if it is this one; else None, with a message if it is another one.

    Raises:
        ValueError: the file cannot be read.
    """
    found = read_run(folder / FILE, mark)
    if found is None:
        return None
    about, tensors = found
    parts: dict[str, dict[str, torch.Tensor]] = {"value": {}, "best": {}, "first": {}, "second": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    moments = {name: (first, parts["second"][name]) for name, first in parts["first"].items()}
    return Run(about["step"], parts["value"], parts["best"], moments, about["best_loss"], about["history"])


def read_run(path: Path, mark: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """The description and the tensors of a run in a file if it is this one; else None, with a message if it is another.

    Raises:
        ValueError: the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["run"])
            different = differences(about["fingerprint"], mark)
            if different:
                logger.warning(
                    "%s is of another run (it is of another model, text or options), so this one starts anew: %s",
                    path,
                    "; ".join(different[:4]),
                )
                return None
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except Exception as error:  # the reader raises many kinds for a damaged file
        raise ValueError(f"{path} is damaged ({error}): remove it to start from the beginning") from error
