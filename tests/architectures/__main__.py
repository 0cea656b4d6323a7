"""Try architectures of Transformers, each in a process of its own, and write docs/architectures.md.

python -m tests.architectures                                   every architecture (an hour or two on 2 cores)
python -m tests.architectures --only mixtral,llama --out -      some; the table is printed
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm
from transformers.models.auto import modeling_auto

from tests.architectures.check import TASKS, Result, check
from tests.architectures.table import table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
CPU_SECONDS, SECONDS = 90, 600


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default=",".join(TASKS), help="tasks, with commas")
    parser.add_argument("--only", default="", help="model types, with commas")
    parser.add_argument("--out", default=str(PAGE), help="the page to write; - prints it")
    parser.add_argument("--results", type=Path, help="a file of results as JSON lines, which is read first and added to")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(",")) if arguments.only else None
    jobs = [(task, kind) for task in arguments.task.split(",") for kind in getattr(modeling_auto, TASKS[task][0])]
    jobs = [job for job in jobs if wanted is None or job[1] in wanted]
    results = _known(arguments.results)
    with tempfile.TemporaryDirectory() as work:
        _warm_up(Path(work) / "warm_up")
        todo = [job for job in jobs if job not in results]
        for result in tqdm(_run(todo, Path(work), arguments.jobs), total=len(todo), unit="architecture", disable=None):
            results[result.task, result.model_type] = result
            if arguments.results:
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(result)) + "\n")
    page = table([results[job] for job in jobs])
    if arguments.out == "-":
        sys.stdout.write(page)
    else:
        Path(arguments.out).write_text(page, encoding="utf-8")


def _known(file: Path | None) -> dict[tuple[str, str], Result]:
    """The results of an earlier run; the last of each architecture counts."""
    if file is None or not file.is_file():
        return {}
    found = [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return {(result.task, result.model_type): result for result in found}


def _warm_up(folder: Path) -> None:
    """Import and build what every check needs, once: children are forked from here."""
    tqdm.monitor_interval = 0
    torch.set_num_threads(1)
    result = check("causal", "llama", folder)
    if result.failed or result.untestable:
        raise RuntimeError(f"llama fails: {result}")


def _run(jobs: list[tuple[str, str]], work: Path, count: int):
    """The results, as they come."""
    context, running, waiting = multiprocessing.get_context("fork"), {}, list(jobs)
    while waiting or running:
        while waiting and len(running) < count:
            job = waiting.pop(0)
            folder = work / "__".join(job)
            process = context.Process(target=_child, args=(*job, folder))
            process.start()
            running[job] = process, folder, time.monotonic()
        time.sleep(0.05)
        for job, (process, folder, started) in list(running.items()):
            late = time.monotonic() - started > SECONDS
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[job]
            file = folder / "result.json"
            if file.is_file():
                yield Result(**json.loads(file.read_text(encoding="utf-8")))
            else:
                died = f"it took more than {SECONDS} s" if late else f"the process died (exit {process.exitcode})"
                yield Result(*job, errors={"all": died})
            shutil.rmtree(folder, ignore_errors=True)


def _child(task: str, model_type: str, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    folder.mkdir(parents=True)
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        result = check(task, model_type, folder)
    file = folder / "result.tmp"
    file.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    file.rename(folder / "result.json")
    os._exit(0)


if __name__ == "__main__":
    main()
