"""A quantization run on disk, so that a stopped run resumes: one file for each finished part, and a file that lists them.

A part is finished when its tensors are in their file, the hidden states that leave it are in theirs, both are flushed to
the disk, and the list names the part. Whatever stops the process, the list names finished parts only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..calibration import processes
from ..calibration.hidden import HiddenFile
from ..checkpoints.durable import differences, durable, flush, remove_temporary
from ..checkpoints.unfinished import lock_path

logger = logging.getLogger(__name__)

FOLDER = ".quantizing"
GRADIENTS = "gradients"  # how the names of files with sums of gradients begin
_STATE, _TEXT, _MOVING = "state.json", "text.safetensors", "moving"


def is_moving(out: Path) -> bool:
    """Whether a run was stopped while its files took their places in this folder, so that it may be of two models."""
    return (out / FOLDER / _MOVING).is_file()


class RunState:
    """The state of one run, in a folder inside the folder that the model will be written to.

    Args:
        out: the folder of the model.
        fingerprint: all that must be the same to resume, by name.
        fresh: whether to delete the state of an earlier run.

    Attributes:
        folder: of the state.
        finished: the prefix of each finished part → the records of its modules.
        seconds: spent by all runs until now, by stage.
        modules: the options of each module, if bits were chosen for each; else None.
        entering: the number of the first block that is not finished.
        hidden_dtype: of the hidden states that enter it, if they are in a file.
        is_exact: whether a block has failed under autocast, so that all later ones run without it.

    Raises:
        ValueError: another process is writing to the same folder; or the folder has the state of another run, and the
            message says what differs.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], fresh: bool = False):
        self.folder = out / FOLDER
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]
        self._lock: int | None = None
        self._fingerprint = json.loads(json.dumps(fingerprint))
        self.finished: dict[str, list[dict[str, Any]]] = {}
        self.seconds: dict[str, float] = {}
        self.modules: dict[str, dict] | None = None
        self.entering = 0
        self.hidden_dtype: torch.dtype | None = None
        self.is_exact = False
        problem = processes.from_first(lambda: self._claim(out, fresh))
        if problem is not None:
            raise problem
        if not processes.is_first() and (self.folder / _STATE).is_file():
            self._read()

    def _claim(self, out: Path, fresh: bool) -> ValueError | OSError | None:
        """Take the folder for this run, and read what is there; returns the error, which all processes raise."""
        try:
            self._take(out, fresh)
        except (ValueError, OSError) as error:
            self._unlock()
            return error
        return None

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, out: Path, fresh: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_path(self.folder)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {out}: wait for it, or choose another place") from None
        if fresh:
            _empty(self.folder)
        remove_temporary(self.folder)
        if (self.folder / _STATE).is_file():
            self._read()
            for left in self.folder.glob("hidden-*.bin"):
                if left.name != f"hidden-{self.entering}.bin":
                    left.unlink()  # of a block that was being quantized, or before the last finished one
            logger.info("Resuming: %d parts are finished.", len(self.finished))

    def _read(self) -> None:
        path = self.folder / _STATE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            fingerprint, self.finished, self.seconds = found["fingerprint"], found["finished"], found["seconds"]
            self.modules, self.entering, dtype = found["modules"], found["entering"], found["hidden_dtype"]
            self.is_exact = found["is_exact"]
            self.hidden_dtype = None if dtype is None else getattr(torch, dtype)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): --fresh starts the run again") from None
        different = differences(fingerprint, self._fingerprint)
        if different and all(difference.startswith("threads ") for difference in different):
            logger.warning("Resuming: %s, so sums may be rounded differently from here on", different[0])
            different = []
        if different:
            raise ValueError(
                f"{self.folder.parent} has an unfinished run with other settings: {'; '.join(different[:6])}. Give the "
                "same settings to resume it, or start again with --fresh (fresh=True)"
            )

    def text(self) -> tuple[torch.Tensor, str] | None:
        """The token ids that an earlier run has made, and their description."""
        path = self.folder / _TEXT
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            return file.get_tensor("ids").clone(), (file.metadata() or {})["description"]

    def keep_text(self, ids: torch.Tensor, description: str) -> None:
        """Write token ids."""
        if processes.is_first():
            self._write(_TEXT, {"ids": ids}, {"description": description})

    def settle(self, modules: Mapping[str, dict] | None) -> None:
        """Record the options of each module."""
        self.modules = dict(modules or {})
        self._record()

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a finished part, as views of its file.

        Raises:
            ValueError: the file cannot be read.
        """
        path = self._path(part)
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): --fresh starts the run again") from None

    def finish(
        self,
        part: str,
        tensors: Mapping[str, torch.Tensor],
        records: Sequence[dict[str, Any]],
        seconds: Mapping[str, float],
        hidden: HiddenFile | None = None,
    ) -> None:
        """Record a part as finished, after its tensors and the hidden states that leave it are on the disk.

        Of several processes, the first writes the tensors, and all flush their hidden states.

        Raises:
            OSError: the disk is full, for example.
        """
        if processes.is_first():
            self._write(self._path(part).name, tensors)
        if hidden is not None:
            flush(hidden.path)
            flush(self.folder)
            self.hidden_dtype = hidden.dtype
            self.entering += 1
        processes.wait()
        self.finished[part], self.seconds = list(records), dict(seconds)
        self._record()
        processes.wait()

    def moving(self) -> None:
        """The files are complete and take their places from now on; see [`is_moving`]."""
        with durable(self.folder / _MOVING) as temporary:
            temporary.touch()

    def close(self, keep: bool) -> bool:
        """End the run; returns whether something of it is left to resume.

        Args:
            keep: whether to leave the state for the next run; without anything in it, it is deleted in any case, and so
                are the folders that were made for it.
        """
        if not processes.is_first():
            return False
        gradients = any(self.folder.glob(f"{GRADIENTS}-*"))
        useful = self.finished or self.modules is not None or (self.folder / _TEXT).is_file() or gradients
        kept = bool(keep and useful)
        if not kept:
            shutil.rmtree(self.folder)
            for folder in self._made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()
        self._unlock()
        return kept

    def _path(self, part: str) -> Path:
        return self.folder / f"part-{part.rstrip('.')}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
        write_tensors(self.folder / name, tensors, metadata)

    def _record(self) -> None:
        if not processes.is_first():
            return
        content = {
            "fingerprint": self._fingerprint,
            "finished": self.finished,
            "seconds": self.seconds,
            "modules": self.modules,
            "entering": self.entering,
            "is_exact": self.is_exact,
            "hidden_dtype": None if self.hidden_dtype is None else str(self.hidden_dtype).removeprefix("torch."),
        }
        with durable(self.folder / _STATE) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a file that is on the disk completely or not at all.

    Raises:
        OSError: the disk is full, for example.
    """
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with durable(path) as temporary:
            save_file(on_cpu, temporary, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
