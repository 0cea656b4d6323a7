"""Runs the kernels' tests in a process of its own: Triton's interpreter must be chosen before a kernel is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


FILES = (
    "interpreted.py",
    "interpreted_grouped.py",
    "interpreted_nearest.py",
    "interpreted_trellis.py",
    "interpreted_viterbi.py",
    "checked.py",
)


def run(selection: str, *names: str) -> None:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    # -p interpreter: before anything imports a kernel
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "interpreter", "-p", "no:cacheprovider", "-m", selection]
    done = subprocess.run(
        [*command, *(str(Path(__file__).with_name(name)) for name in names)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_kernels_in_the_interpreter(name):
    run("not slow", name)


@pytest.mark.slow
def test_large_shapes_in_the_interpreter():
    run("slow", *FILES)
