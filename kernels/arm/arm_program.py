"""Compile kernels/cpu and driver.c for 64-bit ARM, and run the program in QEMU's emulator of one process.

The tools are Debian's packages gcc-aarch64-linux-gnu and qemu-user-static (or qemu-user).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "cpu"
DRIVER = Path(__file__).with_name("driver.c")
FOLDER = ROOT / "build" / "arm"
COMPILER, EMULATORS = "aarch64-linux-gnu-gcc", ("qemu-aarch64-static", "qemu-aarch64")
# Processors that QEMU emulates, by the level of instructions that they have.
PROCESSORS = {"neon": "cortex-a72", "dotprod": "neoverse-n1"}


def missing() -> str | None:
    """The missing tool, in words; None if the program can be built and run."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} (Debian: apt install gcc-aarch64-linux-gnu)"
    if emulator() is None:
        return "qemu-aarch64 (Debian: apt install qemu-user-static)"
    return None


def emulator() -> str | None:
    """QEMU's emulator of one process on 64-bit ARM."""
    return next((found for name in EMULATORS if (found := shutil.which(name))), None)


def build(sources: Path = SOURCES, folder: Path = FOLDER) -> Path:
    """The program, compiled as setup.py compiles the library; an object file is kept as long as its source is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-O3", "-fPIC", "-pthread", "-fopenmp-simd", f"-I{sources}"]
    common = b"".join(path.read_bytes() for path in sorted(sources.glob("*.h")))
    objects, changed, running = [], False, []
    for source in [*sorted(sources.glob("*.c")), DRIVER]:
        key = hashlib.sha256(" ".join([COMPILER, *flags]).encode() + common + source.read_bytes()).hexdigest()[:16]
        out = folder / f"{source.stem}-{key}.o"
        objects.append(str(out))
        if out.exists():
            continue
        for old in folder.glob(f"{source.stem}-*.o"):
            old.unlink()
        temporary = out.with_suffix(f".{os.getpid()}")
        process = subprocess.Popen([COMPILER, "-c", *flags, str(source), "-o", str(temporary)])
        running.append((source, process, temporary, out))
        if len(running) > 1:
            _finish(*running.pop(0))
        changed = True
    for one in running:
        _finish(*one)
    program = folder / "driver"
    if changed or not program.exists():
        # static: the emulator needs no libraries of that processor
        temporary = program.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", str(temporary), "-lm"], check=True)
        temporary.replace(program)
    return program


def _finish(source: Path, process: subprocess.Popen, temporary: Path, out: Path) -> None:
    if process.wait():
        raise RuntimeError(f"{COMPILER} does not compile {source}")
    temporary.replace(out)


def command(program: Path, processor: str, *options: str) -> list[str]:
    """The command that runs the program on a processor of `PROCESSORS`' values, with options of QEMU."""
    found = emulator()
    if found is None:
        raise RuntimeError(f"64-bit ARM is not emulated here, which needs {missing()}")
    return [found, "-cpu", processor, *options, str(program)]
