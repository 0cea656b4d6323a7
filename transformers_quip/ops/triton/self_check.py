"""Whether a device computes right with the Triton kernels: it proves each family once, in a process of its own.

A kernel can be wrong in ways that no test elsewhere shows: it does not compile for this device, gives other numbers, never
ends, or leaves the driver in a state in which nothing works. So each family runs on small inputs (`families.py`) in a child
process with a time limit, before anything depends on it: those that run layers when a layer is loaded, and the encoders
when a weight is first quantized. Families that are right compute from then on; the others are left to plain PyTorch, and
one warning says which, why, and with which versions. The verdicts are kept in a file next to that of the tuned kernels, for
this device, its driver and these versions.

A check never begins while a CUDA graph is recorded: until there is a verdict, nothing is trusted.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from ...version import __version__
from ..backend import overridden
from .route import Encoder, Family

logger = logging.getLogger(__name__)

# Seconds without an answer, after which a kernel is taken for one that never ends. The first answer includes the start of
# Python and of the driver, and each the compilation of its kernels.
PATIENCE = 120.0
# Child processes at once, as most of their time goes into compiling, and the memory that each may need on the device.
CHILDREN, CHILD_BYTES = 8, 1 << 30
# The name of the check of all families together.
LAYER = "whole layers"
# What is checked together, by the end of the name of its file: what runs layers, and what encodes weights.
RUN, ENCODE = "-check", "-check-encoders"
_PURPOSES = {RUN: "run layers", ENCODE: "encode weights"}
_PREFIX = "verdict: "
# Where a driver says its version.
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version", "/sys/module/xe/version")

# The name of what was checked → None if it is right, else the reason why it is not used.
Verdicts = dict[str, str | None]
_known: dict[tuple[str, str], Verdicts] = {}
_trusted: dict[torch.device, frozenset[Family]] = {}
_encodes: dict[torch.device, bool] = {}
_lock = threading.Lock()


def trusted(device: torch.device) -> frozenset[Family]:
    """The families that compute right on this device; it is checked if that is not known."""
    if device not in _trusted:
        found = verdicts(device)
        if not found:
            return frozenset()
        _trusted[device] = frozenset(family for family in Family if found[family.value] is None)
    return _trusted[device]


def encodes(device: torch.device) -> bool:
    """Whether all encoders compute right on this device; they are checked if that is not known."""
    if device not in _encodes:
        found = verdicts(device, ENCODE)
        if not found:
            return False
        _encodes[device] = not any(found.values())
    return _encodes[device]


def verdicts(device: torch.device, kind: str = RUN) -> Verdicts:
    """All verdicts of a kind (RUN or ENCODE) about a device, from this process, the file, or a check.

    Empty where there is no such device, and while a check cannot begin.
    """
    from quip_kernels.gpu import cache

    if not getattr(torch, device.type).is_available():
        return {}
    name = cache.device_name(device)
    key = (name, kind)
    if key in _known:
        return _known[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return {}
    with _lock:
        if key not in _known:
            path, about = cache.file_of(device, kind), versions(device)
            found = _read(path, about, names(kind))
            if found is None:
                logger.info("The Triton kernels that %s are checked on %s, once.", _PURPOSES[kind], name)
                found = examine(str(device), None, PATIENCE, _children(device), kind)
                _write(path, about, found)
            _warn(found, about)
            _known[key] = found
    return _known[key]


def versions(device: torch.device) -> dict[str, str]:
    """Everything on which a verdict depends."""
    import triton

    from quip_kernels.gpu import cache

    return {
        "device": cache.device_name(device),
        "driver": next((Path(file).read_text().splitlines()[0] for file in _DRIVERS if os.path.exists(file)), "not known"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kernels": cache.version(),
        "transformers-quip": __version__,
    }


def names(kind: str = RUN) -> list[str]:
    """All that is checked together, in this order."""
    if kind == ENCODE:
        return [encoder.value for encoder in Encoder]
    return [*(family.value for family in Family), LAYER]


def _children(device: torch.device) -> int:
    """The number of processes that check a device at once: no more than fit into its free memory, at least one."""
    free = getattr(torch, device.type).mem_get_info(device)[0]
    return max(1, min(CHILDREN, os.cpu_count() or 1, free // CHILD_BYTES))


def examine(
    device: str, program: Sequence[str] | None = None, patience: float = PATIENCE, children: int = 1, kind: str = RUN
) -> Verdicts:
    """Check everything of a kind in child processes.

    A child that dies or is silent for too long is stopped; what it was at gets the blame, and another child does the rest.

    Args:
        device: as PyTorch calls it, such as "cuda:0".
        program: to start with the device and the names to check as its arguments (see [`main`]); None: this module.
        patience: seconds to wait for each answer.
        children: processes at once, each with a share of the names.
        kind: RUN or ENCODE.
    """
    program = program or (sys.executable, "-m", __name__)
    shares = [names(kind)[index::children] for index in range(children)]
    with ThreadPoolExecutor(children) as pool:
        parts = list(pool.map(lambda share: _examine(share, [*program, device], patience), shares))
    result = {name: part[name] for name in names(kind) for part in parts if name in part}
    if result.get(LAYER) is not None and all(result[family.value] is None for family in Family):
        # each part is right and the whole is not: no part can be trusted
        result |= {family.value: f"{LAYER}: {result[LAYER]}" for family in Family}
    return result


def _examine(share: Sequence[str], command: Sequence[str], patience: float) -> Verdicts:
    """Check these names in one child after the other."""
    result: Verdicts = {}
    while left := [name for name in share if name not in result]:
        try:
            with _child([*command, *left]) as (answers, died):
                result |= _listen(left, answers, died, patience)
        except OSError as error:
            return dict.fromkeys(share, f"no process can be started to check it ({error})")
    return result


def _listen(left: Sequence[str], answers: queue.Queue[str | None], died: Any, patience: float) -> Verdicts:
    """The answers of one child; at least one."""
    result: Verdicts = {}
    for name in left:
        try:
            line = answers.get(timeout=patience)
        except queue.Empty:
            return result | {name: f"it did not end within {patience:g} s"}
        if line is None:
            reason = died()
            return result if result and reason is None else result | {name: reason or "its process ended without an answer"}
        result[name] = json.loads(line)
    return result


@contextmanager
def _child(command: Sequence[str]) -> Iterator[tuple[queue.Queue[str | None], Any]]:
    """A child process: a queue of its answers (None at the end), and a function that says why it ended, if not well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, env=environment
        )
        assert process.stdout is not None  # a pipe
        answers: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read_answers, args=(process.stdout, answers), daemon=True)
        reader.start()

        def died() -> str | None:
            code = process.wait()
            errors.seek(0)
            said = errors.read().strip().splitlines()
            return f"its process ended with code {code} ({said[-1][:300] if said else 'it said nothing'})" if code else None

        try:
            yield answers, died
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdout.close()


def _read_answers(lines: IO[str], answers: queue.Queue[str | None]) -> None:
    for line in lines:
        if line.startswith(_PREFIX):  # a compiler may print, too
            answers.put(line.removeprefix(_PREFIX))
    answers.put(None)


def _read(path: Path, about: dict[str, str], names: Sequence[str]) -> Verdicts | None:
    """The verdicts of a file on these names; None if it is not there, is damaged, or is about something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.info("%s cannot be read and will be made again (%s)", path, error)
        return None
    if not isinstance(content, dict) or content.get("versions") != about:
        return None
    found = content.get("verdicts")
    if not isinstance(found, dict) or not all(name in found and isinstance(found[name], str | None) for name in names):
        logger.info("%s does not have the expected content and will be made again", path)
        return None
    return found


def _write(path: Path, about: dict[str, str], found: Verdicts) -> None:
    from quip_kernels.gpu import cache

    try:
        cache.write(path, json.dumps({"versions": about, "verdicts": found}, indent=1) + "\n")
    except OSError as error:
        logger.info("%s cannot be written, so the kernels are checked again next time (%s)", path, error)


def _warn(found: Verdicts, about: dict[str, str]) -> None:
    """One warning for everything that is not used."""
    wrong = [f"{name} ({reason})" for name, reason in found.items() if reason is not None]
    if wrong:
        logger.warning(
            "These Triton kernels do not work here, so plain PyTorch computes instead, which is slower: %s. %s",
            "; ".join(wrong),
            ", ".join(f"{name} {version}" for name, version in about.items()),
        )


def main(arguments: Sequence[str]) -> None:
    """Check the families of these names on a device, in order, and print a line for each.

    An error other than a wrong number may leave the driver unusable, so the process ends after it, with code 0. Launch
    parameters are not measured: small inputs say nothing about them, and it takes seconds.

    Args:
        arguments: the device, and the names.
    """
    from quip_kernels.gpu import tune

    from . import families
    from .run import linear

    tune.SECONDS = 0.0
    device = torch.device(arguments[0])
    encoders = {encoder.value: encoder for encoder in Encoder}
    with overridden(backend="triton", devices={"cpu": "triton"} if device.type == "cpu" else None):
        for name in arguments[1:]:
            error = None
            try:
                if name == LAYER:
                    families.whole_layer(device, linear)
                elif name in encoders:
                    families.encode(encoders[name], device)
                else:
                    families.check(Family(name), device)
            except Exception as found:  # whatever it is, it is the verdict
                error = found
            reason = None if error is None else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            print(f"\n{_PREFIX}{json.dumps(reason)}", flush=True)
            if error is not None and not isinstance(error, ArithmeticError):
                return


if __name__ == "__main__":
    main(sys.argv[1:])
