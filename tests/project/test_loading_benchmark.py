"""benchmarks/loading.py: its checkpoints are of the size and bits that it says, and its figures are what they claim."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import loading
import machine
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transformers_quip import QuipLinear
from transformers_quip.checkpoints.headers import read_header
from transformers_quip.hf import foreign as repacking

HIDDEN, INTERMEDIATE = 256, 512
WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE  # of one block
FAMILY = "QTIP 3 bits"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same model with narrow layers."""
    sizes = {loading.HIDDEN: HIDDEN, loading.INTERMEDIATE: INTERMEDIATE}
    sizes |= {3 * loading.HIDDEN: 3 * HIDDEN, 2 * loading.INTERMEDIATE: 2 * INTERMEDIATE}
    for linears in (loading.SEPARATE, loading.FUSED):
        for name, (m, n) in linears.items():
            monkeypatch.setitem(linears, name, (sizes[m], sizes[n]))
    for name, value in {"HIDDEN": HIDDEN, "INTERMEDIATE": INTERMEDIATE, "HEADS": 4, "VOCABULARY": 64}.items():
        monkeypatch.setattr(loading, name, value)


@pytest.mark.parametrize("family", loading.FAMILIES)
@torch.no_grad()
def test_checkpoints(family, tmp_path):
    bits = loading.FAMILIES[family][3]
    assert f"{bits} bits" in family or bits == {"E8P12": 2, "D4": 2, "HI": 4}[family.split()[-1]]
    loading.write(family, tmp_path, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    codes = weights = 0
    for module in model.modules():
        if isinstance(module, QuipLinear):
            codes += sum(p.numel() * p.element_size() for name, p in module.named_parameters() if name.startswith("codes"))
            weights += module.out_features * module.in_features
    assert 8 * codes == bits * weights
    assert weights == len(model.model.layers) * WEIGHTS
    assert abs(codes - 1e6) <= bits * WEIGHTS / 8 / 2  # half a block
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@torch.no_grad()
def test_figures(tmp_path, monkeypatch):
    loading.write(FAMILY, tmp_path, 1)
    file = tmp_path / "model.safetensors"
    size, headers = file.stat().st_size, read_header(file)
    # every call takes half a second, of which the re-packing of a linear makes two; memory is as this says
    clock = iter(range(10**6))
    thread = SimpleNamespace(thread_time=lambda: next(clock) / 2, perf_counter=lambda: next(clock) / 4, process_time=float)
    resident, peaks = iter([10**6, 10**6 + size, 0]), iter([10**6 + 2 * size, 7 * 10**6])
    monkeypatch.setattr(loading, "time", thread)
    monkeypatch.setattr(loading, "status", lambda field: next(resident if field == "VmRSS" else peaks))
    monkeypatch.setattr(repacking, "repack", repacking.repack)  # what the benchmark sets is taken back
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        row = loading.load(tmp_path)
    finally:
        logging.enable_progress_bar()
    assert row["megabytes"] == size / 1e6
    assert (row["peak"], row["end"], row["convert_megabytes"]) == (2, 1, 7)
    assert row["read_seconds"] == 0.25
    assert row["limit_seconds"] == pytest.approx(2 * (0.25 + size / 200e6))
    linears = [name.removesuffix(".trellis") for name in headers if name.endswith(".trellis")]
    repacked = sum(headers[f"{name}.{kind}"].bytes for name in linears for kind in ("trellis", "SU", "SV", "tlut", "rcp"))
    assert row["repacked_megabytes_per_second"] == pytest.approx(repacked / (len(linears) / 2) / 1e6)
    # read, then load: every other call of either clock lies between
    assert row["seconds"] == (2 * len(linears) + 1) / 4
    ids = torch.tensor([[1, 2, 3]])
    foreign, native = (AutoModelForCausalLM.from_pretrained(folder)(ids) for folder in (tmp_path, tmp_path / "native"))
    assert torch.equal(foreign.logits, native.logits)


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_memory_is_that_of_the_process():
    before = loading.status("VmRSS")
    block = torch.ones(16 << 20)  # 64 MiB
    assert 60 << 20 < loading.status("VmRSS") - before < 80 << 20
    del block
    assert loading.status("VmHWM") >= before + (60 << 20)


def test_the_whole_run(tmp_path, monkeypatch, capsys):
    rows = iter(range(1, 3))
    commands = []

    def run(command, **options):
        commands.append(command)
        assert list((tmp_path / "work").glob("*/model.safetensors"))
        row = dict.fromkeys((key for key, _ in loading.COLUMNS.values()), float(next(rows)))
        return SimpleNamespace(stdout=f"something\n{json.dumps(row)}\n")

    monkeypatch.setattr(loading.subprocess, "run", run)
    monkeypatch.setattr(machine, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "work").mkdir()
    arguments = ["--families", FAMILY, "EXL3 2 bits", "--megabytes", "1", "--folder", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["loading.py", *arguments])
    loading.main()
    results = json.loads((machine.RESULTS / "loading.json").read_text())
    assert [(row["family"], row["peak"]) for row in results["rows"]] == [(FAMILY, 1), ("EXL3 2 bits", 2)]
    assert [command[2] for command in commands] == ["--load", "--load"]
    assert not list((tmp_path / "work").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-8:] == ["1", "1.00", "1.00", "1.00", "1.00", "1.00", "1", "1"]
    monkeypatch.setattr(sys, "argv", ["loading.py", "--families", "nothing"])
    with pytest.raises(SystemExit):
        loading.main()
