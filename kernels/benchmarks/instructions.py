"""Compile every Triton kernel without a GPU, and count registers, spills, shared memory, instructions per weight.

    PYTHONPATH=kernels/torch-ext python kernels/benchmarks/instructions.py [--kernel REGEX] [--target sm_90 …] [--save FILE]

Every specimen (kernels/benchmarks/specimens.py) is compiled ahead of time for every target. For NVIDIA, `cuobjdump` and
`nvdisasm`, which Triton brings along, tell the resources and the machine code; instructions are counted between the target
and the end of the largest backward branch, the main loop. For AMD, the numbers stand in the assembly itself.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from specimen import Specimen
from specimens import SPECIMENS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """One kernel on one target.

    Attributes:
        registers: of a thread. shared: bytes of a program.
        spills: bytes of registers that do not fit and live in memory. local: other bytes of a thread's own memory.
        loop: opcode → count in the main loop, of one warp; empty if there is none, and on AMD.
        per_weight: instructions of a thread in the main loop per weight that it decodes; None if that has no meaning.
        loads: opcodes of the loads from global memory in the main loop with their widths.
        inner: instructions of each loop inside the main loop that has no loop inside.
        around: instructions of each loop inside the main loop that has one inside.
    """

    registers: int
    spills: int
    local: int
    shared: int
    loop: dict[str, int]
    per_weight: float | None
    loads: dict[str, int]
    inner: tuple[int, ...] = ()
    around: tuple[int, ...] = ()

    def executed(self, around: int, inner: int) -> int:
        """Instructions of a round of the main loop, with all inner loops in others: the rounds of those, and theirs."""
        return sum(self.loop.values()) + (around - 1) * sum(self.around) + around * (inner - 1) * sum(self.inner)


@functools.cache
def inspect(name: str, target: str) -> Report:
    """Compile a specimen for a target and read the result. Both by name (`SPECIMENS`, `TARGETS`)."""
    specimen, gpu = SPECIMENS[name], TARGETS[target]
    kernel = _compile(specimen, gpu)
    if gpu.backend == "hip":
        return _read_amd(kernel)
    return _read_nvidia(kernel, specimen, specimen.warps_on(gpu))


def _compile(specimen: Specimen, gpu: GPUTarget):
    names = specimen.kernel.arg_names
    constants = {key: (value(gpu) if callable(value) else value) for key, value in specimen.constants.items()}
    source = ASTSource(
        specimen.kernel,
        {name: specimen.arguments.get(name, "constexpr") for name in names},
        {(names.index(key),): value for key, value in constants.items()},
        # launches find out by themselves which pointers and sizes are multiples of 16; torch's allocations are
        {
            (names.index(key),): [["tt.divisibility", 16]]
            for key, kind in specimen.arguments.items()
            if kind.startswith("*") or key in specimen.multiples
        },
    )
    return triton.compile(source, target=gpu, options=specimen.options_on(gpu))


def _read_nvidia(kernel, specimen: Specimen, warps: int) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources:\n{usage}")
    registers, stack, local = map(int, found.groups())
    loop, inner, around, spilling = _main_loop(code)
    loads = collections.Counter(".".join(part for part in op.split(".") if part in ("LDG", "64", "128")) for op in loop)
    per_weight = None
    if specimen.weights_in_loop and loop:
        per_weight = len(loop) * 32 * warps / specimen.weights_in_loop
    return Report(
        registers,
        stack if spilling else 0,
        local + (0 if spilling else stack),
        kernel.metadata.shared,
        dict(collections.Counter(op.split(".")[0] for op in loop).most_common()),
        per_weight,
        {op: count for op, count in loads.items() if op.startswith("LDG")},
        inner,
        around,
    )


def _main_loop(code: str) -> tuple[list[str], tuple[int, ...], tuple[int, ...], bool]:
    """The opcodes inside the largest backward branch, lengths of the loops in it, and whether any uses local memory.

    The lengths are of those without a loop inside, and of those with one.
    """
    labels, lines = {}, []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(lines)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            lines.append(instruction[1].strip())
    loops = []
    for place, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        # every kernel ends in a branch to itself
        if branch and labels.get(branch[1], place) < place:
            loops.append((labels[branch[1]], place))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    innermost, around = [], []
    for begin, end in loops:
        if first < begin and end < last:
            has_one = any(begin <= a and b <= end for a, b in loops if (a, b) != (begin, end))
            (around if has_one else innermost).append(end - begin + 1)
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in lines]
    return (
        opcodes[first : last + 1],
        tuple(innermost),
        tuple(around),
        any(op.split(".")[0] in ("STL", "LDL") for op in opcodes),
    )


def _read_amd(kernel) -> Report:
    assembly = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, assembly)
        if found is None:
            raise RuntimeError(f"the assembly does not say {pattern!r}")
        return int(found[1])

    return Report(
        number(r"\.vgpr_count:\s+(\d+)"),
        4 * (number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"\.sgpr_spill_count:\s+(\d+)")),
        number(r"\.private_segment_fixed_size:\s+(\d+)"),
        kernel.metadata.shared,
        {},
        None,
        {},
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class Saved:
    """Results in a JSON file, written after each so that an interrupted run can be continued; None: nowhere."""

    def __init__(self, path: Path | None):
        self.path = path
        self.content = {"triton": triton.__version__, "kernels": {}}
        if path is not None and path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["triton"] == triton.__version__:
                self.content = content

    def add(self, name: str, target: str, report: Report) -> None:
        """One more result; of kernels that are not specimens any more, none is kept."""
        if self.path is None:
            return
        kernels = self.content["kernels"]
        kernels.setdefault(name, {})[target] = asdict(report)
        self.content["kernels"] = {
            name: {
                target: kernels[name][target]
                for target, gpu in TARGETS.items()
                if target in kernels[name] and specimen.launched(gpu)
            }
            for name, specimen in SPECIMENS.items()
            if name in kernels
        }
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="a regular expression: only the specimens whose names match")
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--opcodes", action="store_true", help="list the opcodes of the main loop")
    parser.add_argument("--save", type=Path, help="a JSON file for the results; results of other kernels in it stay")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}")
    saved = Saved(options.save)
    print(
        f"{'kernel':28} {'target':8} {'registers':>9} {'spills':>6} {'local':>5} {'shared':>6} {'instr/weight':>12}  loads"
    )
    for name in SPECIMENS:
        if not re.search(options.kernel, name):
            continue
        for target in options.target:
            if not SPECIMENS[name].launched(TARGETS[target]):
                continue
            report = inspect(name, target)
            saved.add(name, target, report)
            per_weight = f"{report.per_weight:.2f}" if report.per_weight else "-"
            loads = " ".join(f"{count}×{op}" for op, count in report.loads.items())
            print(
                f"{name:28} {target:8} {report.registers:9} {report.spills:6} {report.local:5} {report.shared:6} "
                f"{per_weight:>12}  {loads}",
                flush=True,
            )
            if options.opcodes:
                print("    " + " ".join(f"{op}:{count}" for op, count in report.loop.items()))


if __name__ == "__main__":
    main()
