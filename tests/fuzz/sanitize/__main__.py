"""python -m tests.fuzz.sanitize: build kernels/cpu with sanitizers, and run the driver and the kernels' tests on it.

AddressSanitizer and UBSan: the driver with one thread, with four,
and with a child of fork; then kernels/tests/test_cpu_*.py,
with the library of this build in the place of the usual one. ThreadSanitizer: the driver with four threads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "kernels" / "cpu"
HERE = Path(__file__).resolve().parent
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
# A report ends the program, so that none is overlooked.
OPTIONS = {
    "ASAN_OPTIONS": "abort_on_error=0:halt_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={HERE / 'tsan.supp'}",
}


def compiler() -> str:
    """The C compiler: $CC, or gcc."""
    found = shutil.which(os.environ.get("CC", "gcc"))
    if found is None:
        raise SystemExit("make sanitize needs gcc, or a compiler that CC names")
    return found


def build(name: str, folder: Path) -> tuple[Path, Path]:
    """(driver, library) with one of `SANITIZERS`; what is newer than its source is kept.

    Functions that are otherwise compiled once for each instruction set are compiled once alone (QUIP_ONE_VERSION): the
    sources are the same, and three copies take minutes.
    """
    objects = folder / name
    objects.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in [*SOURCES.glob("*.h"), *HERE.glob("*.h"), Path(__file__)])
    flags = [
        "-O1",
        "-g",
        "-fno-var-tracking-assignments",
        "-fno-omit-frame-pointer",
        "-fPIC",
        "-pthread",
        "-fopenmp-simd",
        f"-I{SOURCES}",
    ]
    running, made = [], []
    for source in [*sorted(SOURCES.glob("*.c")), HERE / "driver.c"]:
        out = objects / f"{source.stem}.o"
        made.append(out)
        if out.exists() and out.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        command = [
            compiler(),
            "-c",
            *flags,
            "-DQUIP_ONE_VERSION",
            f"-fsanitize={SANITIZERS[name]}",
            str(source),
            "-o",
            str(out),
        ]
        running.append((source, subprocess.Popen(command)))
        if len(running) > 1:
            _finish(*running.pop(0))
    for source, process in running:
        _finish(source, process)
    driver, library = folder / f"{name}-driver", folder / f"{name}.so"
    link = [compiler(), f"-fsanitize={SANITIZERS[name]}", "-pthread"]
    subprocess.run([*link, *map(str, made), "-o", str(driver), "-lm"], check=True)
    subprocess.run([*link, "-shared", *map(str, made[:-1]), "-o", str(library), "-lm"], check=True)
    return driver, library


def _finish(source: Path, process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"{source} was not compiled")


def run_driver(driver: Path, seed: int, calls: int, threads: int, *more: str) -> None:
    """Run it; ends this program with a message if a sanitizer reports something, or results differ."""
    command = [str(driver), str(seed), str(calls), str(threads), *more]
    print(" ".join([driver.name, *command[1:]]), flush=True)
    if subprocess.run(command, env={**os.environ, **OPTIONS}).returncode:
        raise SystemExit(f"{driver.name} has found something")


def run_tests(library: Path, folder: Path) -> None:
    """The kernels' tests on the CPU, with a copy of quip_kernels that has this library."""
    package = folder / "torch-ext"
    shutil.rmtree(package, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "_cpu.*")
    shutil.copytree(ROOT / "kernels" / "torch-ext", package, ignore=ignored)
    shutil.copyfile(library, package / "quip_kernels" / "_cpu.so")
    # a library with AddressSanitizer in a program without it: the runtime must be there first, and Python itself leaks
    runtimes = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    paths = [str(ROOT), str(package)]
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": " ".join(runtimes), "PYTHONPATH": os.pathsep.join(paths)}
    environment["ASAN_OPTIONS"] += ":detect_leaks=0"
    environment["OMP_NUM_THREADS"] = "2"
    tests = sorted(str(path) for path in (ROOT / "kernels" / "tests").glob("test_cpu_*.py"))
    check = f"from quip_kernels import cpu_library as c; assert c.library() and str(c.PATH).startswith({str(package)!r})"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    pythonpath = f"pythonpath={ROOT} {package} {ROOT / 'examples'} {ROOT / 'benchmarks'}"
    # capturing file descriptors would hide the reports, which are not written by Python
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-o",
        pythonpath,
        *tests,
    ]
    if subprocess.run(command, env=environment, cwd=ROOT).returncode:
        raise SystemExit("the kernels' tests fail under AddressSanitizer and UBSan")


def main() -> None:
    """Everything, or ends with a message at the first report."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--calls", type=int, default=900, help="of entry points")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--no-tests", action="store_true", help="the driver alone")
    options = parser.parse_args()
    driver, library = build("asan", options.build)
    run_driver(driver, options.seed, options.calls, 1)
    run_driver(driver, options.seed, options.calls // 8, 4, "fork")
    threads, _ = build("tsan", options.build)
    run_driver(threads, options.seed, options.calls // 4, 4)
    if not options.no_tests:
        run_tests(library, options.build)
    print("AddressSanitizer, UBSan and ThreadSanitizer: nothing found")


if __name__ == "__main__":
    main()
