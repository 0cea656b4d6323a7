"""Figures of tests/fuzz: the results for mutated checkpoints and killed writers. Takes hours; a stopped run resumes.

    python benchmarks/fuzz.py [--mutations 10000] [--kills 300] [--seed 1] [--logs build/fuzz]

Runs of 500 mutations and of 50 kills, with one seed each, are kept in LOGS as JSON lines and not repeated. Delete that
folder after a change of the package. The counts of all are written to results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fuzz.__main__ import summary, table  # noqa: E402
from tests.fuzz.kill import summary as kill_summary  # noqa: E402
from tests.fuzz.kill import table as kill_table  # noqa: E402

CHUNKS = {"tests.fuzz": 500, "tests.fuzz.kill": 50}


def records(module: str, count: int, seed: int, logs: Path) -> list[dict]:
    """The records of `count` mutations or kills; those that are not in the logs are made."""
    result: list[dict] = []
    for number in range(-(-count // CHUNKS[module])):
        log = logs / f"{module}-{seed + number}.jsonl"
        if not log.exists():
            unfinished = log.with_suffix(".partial")
            unfinished.unlink(missing_ok=True)
            options = ["--count", str(CHUNKS[module]), "--seed", str(seed + number), "--log", str(unfinished)]
            found = subprocess.run([sys.executable, "-m", module, *options], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
            if found not in (0, 1) or not unfinished.exists():  # 1: there are faults, which are counted
                raise RuntimeError(f"{module} --seed {seed + number} failed")
            unfinished.rename(log)
        result += [json.loads(line) for line in log.read_text().splitlines()]
    return result


def main() -> None:
    """Run the missing parts, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    logs = options.logs.absolute()
    logs.mkdir(parents=True, exist_ok=True)
    mutated = records("tests.fuzz", options.mutations, options.seed, logs)
    killed = records("tests.fuzz.kill", options.kills, options.seed, logs)
    print(table(mutated, "family"), table(mutated, "route"), kill_table(killed), sep="\n\n")
    faults = Counter(fault for record in killed for fault in record["faults"])
    machine.save("fuzz", {"mutations": summary(mutated), "kills": kill_summary(killed) | {"what": dict(faults)}})


if __name__ == "__main__":
    main()
