"""Runs the tests of the compiled library on 64-bit ARM, in an emulator: kernels/arm says how.

They are the same tests, with the same expected values, in a process of their own, whose calls into the library go to the
emulated one (arm_library.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import arm_library
import arm_program
import pytest
import torch

from quip_kernels import cpu_library, cpu_linear
from tests import truth

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    *(f"kernels/tests/test_cpu_{name}.py" for name in ("linear", "nibbles", "records", "residual", "trellis", "viterbi")),
    *(f"tests/codebooks/test_{name}.py" for name in ("e8p", "residual", "scalar")),
)

pytestmark = pytest.mark.skipif(arm_program.missing() is not None, reason=f"this test needs {arm_program.missing()}")


@pytest.fixture(scope="module")
def program():
    return arm_program.build()


@pytest.mark.parametrize("name", arm_program.PROCESSORS)
def test_the_level_is_found_and_the_processor_has_its_instructions(program, name):
    with arm_library.Library(program, arm_program.PROCESSORS[name]) as library:
        level = library.quip_cpu_level()
        assert cpu_library.LEVELS_OF["arm"][level] == name
        m, n = 20, 100
        codes, x, y = truth.random_linear(m, n)["codes"], torch.randn(n), torch.empty(m)
        _, address = cpu_linear.layer_of(n, (codes, None, None, None, None), None, None, 1.0)
        assert library.quip_linear(address, x.data_ptr(), y.data_ptr(), 1, n, 0, 0, 3, level, 1) == 0
    assert truth.relative_error(y, truth.decode(codes, n) @ x.double()) < 1e-6


def run(*options: str) -> None:
    paths = [str(ROOT / "kernels" / "arm"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    # -p arm_library: before anything imports a kernel
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "arm_library", "-p", "no:cacheprovider", *options, *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_kernels_on_arm(program):
    """A part of them, within a minute."""
    run("--arm-share", "quick")


@pytest.mark.slow
def test_all_kernels_on_arm(program):
    run()
