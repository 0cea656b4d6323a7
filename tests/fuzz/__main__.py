"""python -m tests.fuzz: mutate checkpoints and count what becomes of them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm

from .specimens import make_specimens
from .verdict import FAULTS, ORDER
from .worker import logits, one

GOLDEN = Path(os.environ.get("QUIP_GOLDEN") or Path(__file__).resolve().parents[2].parent / "shared" / "golden")


def prepare(folder: Path, only: tuple[str, ...] = (), golden: Path | None = None) -> dict[Path, torch.Tensor]:
    """Make the specimens in `folder`, and say what each computes."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tqdm.set_lock(threading.RLock())  # its own lock is shared by all processes, and a killed one would keep it
    logging.disable(logging.WARNING)
    try:
        return {path: logits(path) for path in make_specimens(folder, golden, only)}
    finally:
        logging.disable(logging.NOTSET)


def family(specimen: str) -> str:
    """Of a specimen, by its name."""
    for mark, name in (("exl3", "EXL3"), ("qtip", "QTIP"), ("qs_", "QuIP#"), ("quip-sharp", "QuIP#")):
        if specimen.startswith("foreign") and mark in specimen:
            return name
    return "QuIP-for-all" if specimen.startswith("foreign") else "native"


def table(records: Iterable[dict[str, Any]], key: str) -> str:
    """Verdicts by one property of the records, as a table of Markdown."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        for name in (record[key], "all"):
            counts[name][record["verdict"]] += 1
    rows = [(key, "tried", *ORDER), ("---",) * (len(ORDER) + 2)]
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        rows.append((name, str(counts[name].total()), *(str(counts[name][word] or "") for word in ORDER)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts that are published."""
    by_family = {
        name: dict(Counter(record["verdict"] for record in records if record["family"] == name))
        for name in sorted({record["family"] for record in records})
    }
    return {
        "mutations": len(records),
        "verdicts": {word: sum(record["verdict"] == word for record in records) for word in ORDER},
        "families": by_family,
        "largest_memory_mb": max(record.get("memory_mb", 0) for record in records),
        "seeds": sorted({record["seed"] for record in records}),
    }


def groups(records: list[dict[str, Any]], word: str) -> str:
    """The records of one verdict, those that are alike together, with an example that can be repeated."""
    found: dict[tuple, list] = defaultdict(list)
    for record in records:
        if record["verdict"] == word:
            alike = record.get("own") or record.get("raised") or record["mutation"]
            found[record["route"], record.get("type", ""), alike].append(record)
    lines = []
    for key, same in sorted(found.items(), key=lambda item: -len(item[1])):
        first = same[0]
        said = str(first.get("message") or first.get("damage") or first.get("left") or "")[:200].replace("\n", " ")
        lines.append(
            f"{word}: {len(same)} × {' '.join(key)}, e.g. --seed {first['seed']} --replay {first['number']}: "
            f"{first['specimen']}: {first['what'][:120]} → {said}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """All mutations that are asked for, in `options.jobs` processes."""
    (work / "specimens").mkdir()
    golden = GOLDEN if GOLDEN.is_dir() else None
    specimens = prepare(work / "specimens", (), golden)
    specimens = {path: value for path, value in specimens.items() if options.match in path.name}
    logging.disable(logging.WARNING)
    if options.replay is not None:
        return [one(options.replay, options.seed, specimens, work / "replay", options.only, options.route)]
    children = []
    for job in range(options.jobs):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _job(options, specimens, job, work)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise RuntimeError("a job of the harness itself failed")
    return [json.loads(line) for job in range(options.jobs) for line in (work / f"{job}.jsonl").read_text().splitlines()]


def _job(options: argparse.Namespace, specimens: dict[Path, torch.Tensor], job: int, work: Path) -> None:
    with (work / f"{job}.jsonl").open("w") as file:
        for number in range(job, options.count, options.jobs):
            record = one(number, options.seed, specimens, work / f"job{job}", options.only, options.route)
            record["family"] = family(record["specimen"])
            line = json.dumps(record) + "\n"
            file.write(line)
            file.flush()
            if options.log:
                with options.log.open("a") as log:
                    log.write(line)


def main() -> int:
    """Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="name of a mutation")
    parser.add_argument("--match", default="", help="part of a specimen's name")
    parser.add_argument("--route", help="load, inspect, convert, convert(), card or compare")
    parser.add_argument("--replay", type=int, help="repeat one mutation, and print everything of it")
    parser.add_argument("--log", type=Path, help="a file to which every record is added, one line of JSON each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quip-fuzz-") as work:
        records = run(options, Path(work))
    if options.replay is not None:
        print(json.dumps(records[0], indent=1))
        return 0
    for key in ("family", "route"):
        print("\n" + table(records, key), end="\n\n")
    for word in (*FAULTS, "cryptic, theirs"):
        print(groups(records, word), end="\n" if any(record["verdict"] == word for record in records) else "")
    return int(any(record["verdict"] in FAULTS for record in records))


if __name__ == "__main__":
    sys.exit(main())
