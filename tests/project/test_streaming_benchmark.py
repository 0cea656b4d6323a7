"""benchmarks/streaming.py on a tiny model: all ways make the same bytes, and the figures are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--hidden", "128", "--intermediate", "192", "--blocks", "2", "--samples", "4", "--tokens", "16", "--sweeps", "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_a_tiny_model(tmp_path):
    paths = [str(ROOT), str(ROOT / "kernels/torch-ext"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "BENCHMARK_RESULTS": str(tmp_path / "results")}
    command = [
        sys.executable,
        ROOT / "benchmarks/streaming.py",
        tmp_path / "work",
        *SIZES,
        "--ways",
        "stream",
        "memory",
        "resumed",
    ]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results" / "streaming.json").read_text())
    block = 2 * 128 * 128 + 2 * 128 * 128 + 3 * 128 * 192 + 2 * 128  # one head of 128 for keys and values
    assert found["parameters"] == 2 * 32000 * 128 + 128 + 2 * block
    assert found["quantized_bytes"] > 2 * 2 * 32000 * 128  # embeddings and head in bfloat16
    for way in ("stream", "memory"):
        assert 0 < found["ways"][way]["anonymous"] <= found["ways"][way]["resident"]
        assert found["ways"][way]["seconds"] > found["ways"][way]["stages"]["round"] > 0
    assert found["ways"]["resumed"]["killed_after"] == 1
    assert found["ways"]["resumed"]["stages"]["round"] > found["ways"]["resumed"]["stages_before"]["round"] > 0
    assert found["ways"]["stream"]["predicted"].keys() == {"memory", "time"}
    assert not (tmp_path / "work").exists()
