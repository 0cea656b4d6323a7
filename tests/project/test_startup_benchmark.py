"""benchmarks/startup.py: its large model has the size that it should have, and is described within its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import startup

from transformers_quip.checkpoints.inventory import read_folder


@pytest.fixture
def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_large_model(tmp_path, environment):
    startup.write_large_model(tmp_path, headers=True)
    inventory = read_folder(tmp_path)
    # on paper: Llama 3 of 70.55 billion parameters
    m, n, i = 1024, 8192, 28672
    block = 2 * n * n + 2 * m * n + 3 * n * i
    assert inventory.quantized_weights == 80 * block
    assert inventory.parameters == 70_553_706_496
    rows, columns = 2 * n + 2 * m + 2 * i + n, 4 * n + 2 * n + i
    assert inventory.true_bits == pytest.approx(2 + 16 * (rows + columns) / block, rel=1e-9)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 10e6  # nothing behind the headers
    # its own peak, as a benchmark's process has it: what the system counts for a child begins with the parent's
    code = "import startup; print(*startup.run('-m', 'transformers_quip.cli', 'inspect', FOLDER, '--json'))"
    code = code.replace("FOLDER", repr(str(tmp_path)))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    _, peak, said = result.stdout.split(maxsplit=2)
    assert json.loads(said)["quantized_layers"] == 560
    assert float(peak) < 300e6


def test_an_index_alone(tmp_path):
    startup.write_large_model(tmp_path, headers=False)
    inventory = read_folder(tmp_path)
    assert inventory.total_bytes == sum(size for *_, size in startup.tensors())
    assert len(inventory.names) == 80 * 23 + 3


def test_a_process_is_measured(environment):
    """From a small process, as the benchmark is: a child's peak begins with its parent's."""
    code = "import startup; print(*startup.run('-c', 'import time; x = [0] * 6_250_000; time.sleep(0.2); print(5)'))"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, peak, said = map(float, result.stdout.split())
    assert said == 5
    assert 0.2 < seconds < 60
    assert 50e6 < peak < 100e6
    with pytest.raises(SystemExit, match="ended with status"):
        startup.run("-c", "raise SystemExit(3)")
