"""The tables of one run of benchmarks/gpu_run.sh, from the files that its steps have written.

python benchmarks/gpu_summary.py
"""

from __future__ import annotations

import json
import sys

import machine
from gpu import COLUMNS, EXPERT_COLUMNS, table

# The least that is wanted (kernels at batch 1, large shapes): share of the card's copy bandwidth, times dense bfloat16.
TARGETS = {"matvec_int8_share": 0.8, "matvec_exact_share": 0.6, "layer_speedup": 3.0}
LARGE = 4096 * 14336


def main() -> int:
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in machine.RESULTS.glob("gpu-*.json")}
    if not found:
        print(f"no results of gpu_run.sh in {machine.RESULTS}", file=sys.stderr)
        return 1
    for name, content in sorted(found.items()):
        print(f"\n{name}: {content['gpu']}, relative error {content.get('relative_error')}")
        for part, error in content.get("errors", {}).items():
            print(f"  FAILED {part}: {error}")
        if layers := content.get("layers"):
            print(table(COLUMNS, [[layer[column] for column in COLUMNS] for layer in layers]))
            for column, least in TARGETS.items():
                reached = [row[column] for row in layers if row["bits"] == 2 and row["m"] * row["n"] >= LARGE]
                if reached:
                    print(f"  {column}: {min(reached):.2f} at the least, {least} is wanted")
        if experts := content.get("experts"):
            print(table(EXPERT_COLUMNS, [[row[column] for column in EXPERT_COLUMNS] for row in experts]))
        for kind, speedup in content.get("generate", {}).get("speedup", {}).items():
            print(f"  generate, {kind}: {speedup:.2f} times dense bfloat16")
        if groups := content.get("quantize"):
            print(f"  one block is rounded in {sum(row['seconds'] for row in groups):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
