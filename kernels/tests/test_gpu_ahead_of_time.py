"""Every Triton kernel compiled for every architecture without a GPU: no register may be spilled.

The default run has the launches of a 4096-wide model on two architectures; `-m slow` has all of them everywhere.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the package triton is not installed: kernels cannot be compiled")
tl = pytest.importorskip("triton.language")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)


def load_benchmark(name):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


for needed in ("specimen", "specimens_grouped", "specimens_nearest", "specimens_trellis", "specimens"):
    load_benchmark(needed)
instructions = load_benchmark("instructions")

# One of each kernel, as a 4096-wide model in half precision launches it for one token, a small batch and a prompt.
USUAL = (
    "matvec e8p 1x2 gather 32",
    "matvec e8 1x2 gather 32",
    "quantize 2",
    "small batch e8p 16x1 gather 4",
    "halves 1",
    "grouped e8p 16x1 gather 4",
    "grouped e8p 16x1 uneven",
    "dequantize",
    "sylvester 4096 fp16",
    "sylvester quantize 4096 2",
    "factor 28 terms 2",
    "panel one stage",
    "panel e8",
    "panel scalar",
    "trellis hyb k2 qtip 1",
    "trellis mul1 k2 exl3 dequantize",
    "trellis mul1 k2.5 exl3 1",
    "viterbi 2 1 0 closed",
    "viterbi 4 1 2 free",
)
USUAL_TARGETS = ("sm_90", "gfx942")
# Bytes that one program may have.
SHARED_MEMORY = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "gfx1100": 64 << 10,
}
# Bytes of registers that do not fit, where there are any.
SPILLS = {("grouped e8p 64x2 gather 4", "sm_89"): 8}
CASES = [
    (name, target)
    for name, specimen in instructions.SPECIMENS.items()
    for target, gpu in instructions.TARGETS.items()
    if specimen.launched(gpu)
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Compile without the user's cache, and leave nothing in it, unless TRITON_CACHE_DIR names a folder for results."""
    if os.environ.get("TRITON_CACHE_DIR"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check(name, target):
    report = instructions.inspect(name, target)
    assert report.spills <= SPILLS.get((name, target), 0)
    assert report.local == 0
    assert report.registers > 0
    assert report.shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize("target", USUAL_TARGETS)
@pytest.mark.parametrize("name", USUAL)
def test_no_spills(name, target):
    check(name, target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [case for case in CASES if case[0] not in USUAL or case[1] not in USUAL_TARGETS]
)
def test_no_spills_anywhere(name, target):
    check(name, target)


def test_every_specimen_is_recorded_for_every_target():
    """`kernels/benchmarks/instructions.py --save` has compiled them all, with no spills but these."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "instructions.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    recorded = {(name, target): report["spills"] for name, reports in kernels.items() for target, report in reports.items()}
    assert set(recorded) == set(CASES)
    assert {case: spills for case, spills in recorded.items() if spills} == SPILLS


@pytest.mark.parametrize("columns", ["gather 32", "uneven"])  # multiples of 1024, and others
@pytest.mark.parametrize("digits", [1, 2])  # int8 and exact activations
def test_matvec_takes_two_instructions_a_weight_and_loads_128_bits(digits, columns):
    report = instructions.inspect(f"matvec e8p 1x{digits} {columns}", "sm_90")
    assert report.per_weight <= 2.0
    assert set(report.loads) == {"LDG.128"}
    assert report.loop["IDP"] > 0  # dp4a


def test_budgets_of_quantizing_on_paper():
    """A 4096x4096 layer in 2 s, an 8B model in 30 minutes and 24 GB; and the arithmetic of two of the terms by hand."""
    budgets = load_benchmark("budgets")
    card = budgets.CARDS[0]
    instructions_of_a_block = instructions.inspect("panel one stage", "sm_90").executed(*budgets.ROUNDS)
    # 448 candidates on both sides of the shift: eight products each, for two rows by each warp's 32 lanes
    assert 2 * 448 * 8 * 2 / 32 < instructions_of_a_block < 12000
    layer = budgets.group_seconds(card, 4096, 4096, instructions_of_a_block)
    assert 0 < sum(layer.values()) < 2
    assert layer["launches"] == pytest.approx(32 * 14 * 24 * 6e-6)
    assert sum(budgets.model_seconds(card, instructions_of_a_block).values()) < 30 * 60
    assert budgets.model_bytes()["sums of the Hessians"] == 8 * (3 * 4096**2 + 14336**2)
    assert sum(budgets.model_bytes().values()) < 24e9


def test_the_self_check_compiles_few_kernels():
    """Each takes 0.2 to 3 seconds to compile, and whoever loads a model onto a new device waits for the slowest part."""
    from transformers_quip.ops.triton import self_check

    program = Path(__file__).resolve().parents[1] / "benchmarks" / "self_check.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, program, "--count"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts = {name: int(count) for name, count in re.findall(r"^(\S.*?) +(\d+) kernels", done.stdout, re.MULTILINE)}
    assert list(counts) == self_check.names() + self_check.names(self_check.ENCODE)
    assert all(0 < count <= 18 for count in counts.values()), counts


@triton.jit
def _too_much(x, y, SIZE: tl.constexpr, ROUNDS: tl.constexpr):
    """Keeps ROUNDS·SIZE numbers at once: each is needed once more when all have been read."""
    place = tl.arange(0, SIZE)
    values = ()
    for i in tl.static_range(ROUNDS):
        values = values + (tl.load(x + i * SIZE + place, volatile=True),)  # noqa: RUF005 - Triton has no starred ones
    for i in tl.static_range(ROUNDS):
        tl.store(y + i * SIZE + place, values[ROUNDS - 1 - i])


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_seen(target, monkeypatch):
    # 1280 numbers a thread of NVIDIA's, 640 of AMD's, which have 255 and 512 registers
    kernel = instructions.Specimen(_too_much, {"x": "*fp32", "y": "*fp32"}, {"SIZE": 8192, "ROUNDS": 5}, warps=1)
    monkeypatch.setitem(instructions.SPECIMENS, "too much", kernel)
    with pytest.raises(AssertionError, match="spills"):
        check("too much", target)
