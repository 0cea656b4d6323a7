"""The fastest of a few ways to launch a kernel, measured once on the device and cached in a file.

Shapes whose sizes round up to the same powers of two share an answer, so a model has a handful of questions. Most of the
time goes into compiling. A question ends with the best of the candidates that were measured within `QUESTION_SECONDS`. When
a process has spent `SECONDS`, the first candidate answers the rest of its questions, and a later process measures them.

The file (`cache.py`) holds the results of one device and one version of the kernels. If it cannot be read or written,
kernels are measured again.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from . import cache
from .launch import current, interpreted

logger = logging.getLogger(__name__)

Candidate = TypeVar("Candidate")

# For all questions of a process together, and for one of them; a measurement that has begun is finished.
SECONDS = 10.0
QUESTION_SECONDS = 5.0
_answers: dict[torch.device, dict[str, int]] = {}
_spent = 0.0


def choose(
    kernel: str,
    shape: tuple[int, ...],
    candidates: Sequence[Candidate],
    device: torch.device,
    run: Callable[[Candidate], object],
    unfit: Candidate | None = None,
) -> Candidate:
    """The fastest candidate.

    Args:
        kernel: name of the question, with everything but sizes that the answer may depend on.
        shape: sizes, of which the powers of two count.
        candidates: the first is taken where nothing can be measured: in the interpreter, while a CUDA graph is recorded,
            without memory to measure in, when the time is used up.
        run: launches the kernel as a candidate says, on inputs of this shape.
        unfit: an earlier answer of this function that does not fit onto the device, because the file of answers was made
            on another device or was edited: if it is still the answer, all candidates are measured again.

    Raises:
        OutOfResources: no candidate fits onto the device.
    """
    if len(candidates) == 1 or interpreted():
        return candidates[0]
    if device not in _answers:
        _answers[device] = _read(cache.file_of(device))
    question = f"{kernel} {'x'.join(str(triton.next_power_of_2(size)) for size in shape)}"
    answer = _answers[device].get(question)
    if answer is None or answer >= len(candidates) or (unfit is not None and candidates[answer] == unfit):
        answer = _measure(question, candidates, device, run)
        if answer is None:
            return candidates[0]
        _answers[device][question] = answer
        _write(cache.file_of(device), _answers[device])
    return candidates[answer]


def run_fastest(
    kernel: str,
    shape: tuple[int, ...],
    candidates: Sequence[Candidate],
    device: torch.device,
    run: Callable[[Candidate], object],
) -> None:
    """Launch a kernel as the fastest candidate says, see [`choose`]; an answer that does not fit is asked for again."""
    candidate = choose(kernel, shape, candidates, device, run)
    try:
        run(candidate)
    except OutOfResources:  # the remembered answer is of another device
        again = choose(kernel, shape, candidates, device, run, unfit=candidate)
        if again == candidate:
            raise
        run(again)


def _measure(
    question: str, candidates: Sequence[Candidate], device: torch.device, run: Callable[[Candidate], object]
) -> int | None:
    """Index of the fastest candidate, None if it cannot be told now."""
    global _spent
    if _spent >= SECONDS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    times: dict[int, float] = {}
    asked, longest = time.perf_counter(), 0.0
    too_large: OutOfResources | None = None
    for index, candidate in enumerate(candidates):
        begin = time.perf_counter()
        if times and begin - asked + longest > QUESTION_SECONDS:
            break  # the next one takes about as long as the others
        try:
            times[index] = milliseconds(functools.partial(run, candidate), device)
        except OutOfResources as error:
            too_large = error
        except torch.OutOfMemoryError:
            return None
        finally:
            took = time.perf_counter() - begin
            _spent += took
            longest = max(longest, took)
    if not times:
        assert too_large is not None  # every candidate either has a time or was too large
        raise too_large
    best = min(times, key=times.__getitem__)
    logger.debug("%s: %s takes %.4f ms, of %s", question, candidates[best], times[best], times)
    return best


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a launch that finds nothing in the device's cache."""
    with current(device):
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def _read(path: Path) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.info("%s cannot be read and will be made again (%s)", path, error)
        return {}
    if not isinstance(content, dict):
        logger.info("%s does not have the expected content and will be made again", path)
        return {}
    return {key: value for key, value in content.items() if type(value) is int and value >= 0}


def _write(path: Path, answers: dict[str, int]) -> None:
    """Write the file, merged with the answers of other processes."""
    try:
        cache.write(path, json.dumps(_read(path) | answers, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        logger.info("%s cannot be written, so kernels are measured again next time (%s)", path, error)
