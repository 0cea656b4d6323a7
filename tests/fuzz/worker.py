"""One mutated checkpoint, read in a process of its own with limits on time, memory and the size of files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from transformers_quip import cli
from transformers_quip.hf.convert import convert
from transformers_quip.hub.model_card import write_card

from . import mutate_bin, mutate_config, mutate_tensors  # noqa: F401 - they register their mutations
from .explain import config_damage, weight_damage
from .mutations import DESCRIPTIONS, mutate
from .raw import RawFile
from .verdict import is_clear, is_ours, place, verdict

CPU_SECONDS, SECONDS = 30, 600  # of the processor; of the clock, on a machine that others use too
MORE_MEMORY = 1 << 30  # bytes, above what the parent has
ADDRESSES = 3 << 30  # of address space, above what the parent has
FILE_SIZE = 1 << 28
TOLERANCE = 1e-4


def logits(folder: Path) -> torch.Tensor:
    """What a checkpoint computes for fixed token ids."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 15)[None] % model.config.get_text_config().vocab_size).logits


def one(number: int, seed: int, specimens: dict[Path, torch.Tensor], work: Path, only: str | None = None,
        route: str | None = None) -> dict[str, Any]:  # fmt: skip
    """Mutate a copy of a specimen, read it, and say what became of it.

    Args:
        number, seed: choose the specimen, the mutation and the way it is read.
        specimens: folder → logits.
        work: a folder that is replaced.
        only: name of a mutation.
        route: one of `ROUTES`; None: by chance.
    """
    rng = random.Random(f"{seed}/{number}")
    source = rng.choice(sorted(specimens))
    shutil.rmtree(work, ignore_errors=True)
    folder = work / "model"
    shutil.copytree(source, folder)
    mutator, what = mutate(folder, rng, only)
    chosen = rng.choice(ROUTES)
    if mutator.startswith(("card", "evaluation")):
        chosen = "card"  # nothing else reads them
    if (chosen == "card" and "foreign" in source.name) or (chosen.startswith("convert") and "native" in source.name):
        chosen = "load"
    record: dict[str, Any] = {"number": number, "seed": seed, "specimen": source.name, "mutation": mutator, "what": what}
    record["route"] = route or chosen
    record |= _in_child(lambda: _read(record["route"], source, folder, specimens[source]))
    strange = {path.name for path in work.iterdir()} - {"model", "outside.safetensors", "converted", "stderr"}
    if mutate_bin.MARKER in strange or (folder / mutate_bin.MARKER).exists():
        record["outcome"] = "executed"
    elif strange:
        record["left"] = sorted(strange)
    record["verdict"] = verdict(record)
    return record


def _in_child(read: Any) -> dict[str, Any]:
    """The record that `read` returns in a child with limits; or how the child ended."""
    source, sink = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(source)
            _limit()
            os.write(sink, json.dumps(read()).encode()[: 1 << 15])
            code = 0
        finally:
            os._exit(code)
    os.close(sink)
    answered = bool(select.select([source], [], [], SECONDS)[0])
    content = os.read(source, 1 << 16) if answered else b""
    if not answered:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(source)
    spent = {"seconds": round(time.monotonic() - begin, 2)}
    if content:
        return {**json.loads(content), **spent}
    if not answered or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return {"outcome": "hang", "status": status, **spent}
    return {"outcome": "crash", "status": status, **spent}


def _limit() -> None:
    """Limits of this process; nothing that it prints is seen."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (pages + ADDRESSES,) * 2)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def _read(route: str, source: Path, folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """Go one way with a checkpoint. Returns what `verdict` needs."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, step = folder.parent / "converted", route
    try:
        if route in SHOW:
            return _shown(SHOW[route](source, folder)) | _memory(memory)
        if route in CONVERT:
            CONVERT[route](folder, out)
            folder, step = out, "load"
        found = logits(folder)
        if _is_same(found, expected):
            return {"outcome": "same"} | _memory(memory)
        changed = folder.parent / "model"
        return {"outcome": "other", "damage": _effective_damage(route, source, changed, expected)[:5]} | _memory(memory)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [place(frame) for frame in frames if "transformers_quip" in frame.filename]
        full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        return {
            "outcome": "memory" if full else "error",
            "type": type(error).__name__,
            "message": str(error)[:500],
            "raised": place(frames[-1]),
            "own": own[-1] if own else "",
            "clear": is_clear(error, _names(source, folder.parent / "model")),
            "ours": is_ours(step, frames),
            "left": ["converted"] if step in CONVERT and out.exists() else [],
        } | ({} if full else _memory(memory))


def _shown(text: str) -> dict[str, Any]:
    """The record of what a terminal or a card shows."""
    hidden = [c for c in text if c not in "\n\t\r" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    return {"outcome": "shown", "unprintable": ascii(hidden[:5]) if hidden else ""}


def _memory(before: int) -> dict[str, Any]:
    """What was needed above `before`, in KiB; too much of it is an outcome of its own."""
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"memory_mb": more >> 10} | ({"outcome": "memory"} if more << 10 > MORE_MEMORY else {})


def _effective_damage(route: str, source: Path, folder: Path, expected: torch.Tensor) -> list[str]:
    """The damage of a checkpoint that was read all the same, and that changes what it computes.

    Damage of the description is tried with the sound weights, and damage of the weights with the sound description: what
    changes nothing on its own is not to blame for what possible values do.
    """
    result = []
    for found, description in ((config_damage(source, folder), folder), (weight_damage(source, folder), source)):
        if not found:
            continue
        half = folder.parent / "half" / f"{len(list(folder.parent.glob('half/*')))}"
        shutil.copytree(folder if description is source else source, half, symlinks=True)
        for name in DESCRIPTIONS:
            (half / name).unlink(missing_ok=True)
            if (description / name).is_file():
                shutil.copyfile(description / name, half / name)
        with contextlib.suppress(Exception):  # refused: then it was not this damage that was read
            read = half
            if route in CONVERT:
                read = half.with_name(f"{half.name}-converted")
                CONVERT[route](half, read)
            if not _is_same(logits(read), expected):
                result += found
        shutil.rmtree(half.parent)
    return result


def _command(*arguments: Any) -> str:
    """What a command prints; it raises what the command raises."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        cli.commands.main(args=list(map(str, arguments)), prog_name="transformers-quip", standalone_mode=False)
    return said.getvalue()


# route → what writes the native checkpoint of a foreign one; and what shows a checkpoint, beside the sound one.
CONVERT: dict[str, Callable[[Path, Path], Any]] = {
    "convert": lambda folder, out: _command("convert", folder, out),
    "convert()": lambda folder, out: convert(folder, out, shard_size=20_000),
}
SHOW: dict[str, Callable[[Path, Path], str]] = {
    "inspect": lambda _, folder: "".join(_command("inspect", folder, *more) for more in ([], ["--layers"], ["--json"])),
    "compare": lambda source, folder: "".join(_command("compare", source, folder, *more) for more in ([], ["--json"])),
    "card": lambda _, folder: str(write_card(folder)),
}
ROUTES = ("load",) * 5 + (*CONVERT, *SHOW)


def _is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape or not found.isfinite().all():
        return False
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _names(source: Path, folder: Path) -> set[str]:
    """What a clear error may name: files, tensors, modules and options of the sound and of the changed checkpoint."""
    result = {
        str(source),
        str(folder),
        str(folder.parent / "converted"),
        "config.json",
        "quantization_config",
        "quip_params",
    }
    for place_ in (source, folder):
        result |= {path.name for path in place_.iterdir()}
        for path in place_.glob("*.json"):
            with contextlib.suppress(ValueError, OSError, RecursionError):
                result |= set(_keys(json.loads(path.read_bytes())))
        for path in place_.glob("*.safetensors"):
            with contextlib.suppress(Exception):  # a damaged one has no names
                result |= {name.rsplit(".", drop)[0] for name in RawFile(path).names for drop in range(name.count("."))}
    return result


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    return [key for item in value for key in _keys(item)] if isinstance(value, list) else []
