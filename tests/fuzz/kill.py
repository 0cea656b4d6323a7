"""Kills writers at random moments, looks at what they leave, and lets the next run clean up.

    python -m tests.fuzz.kill --count 300 --seed 1

A writer is a forked child, so that no time goes into imports, and SIGKILL gives it no chance to do anything. After a kill:

- what lay beside OUT is untouched, and what was in OUT is still there, or the complete new model is in its place;
- no folder holds something that loads and computes neither what the old model does nor what the new one does;
- the same command, run again, ends well; it names what the killed run had left, and nothing of that is there afterwards.

`model.save_pretrained` and `quantize` write into OUT itself, which may hold other files. While their files take their
places, OUT is not a model ("refused"): for them the second and the third rule hold. A killed `quantize` is resumed by the
next run, which must write the bytes of an undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from tests import foreign
from tests.models import tiny_model, tiny_tokenizer
from transformers_quip import QuipConfig, cli
from transformers_quip.hf.convert import convert
from transformers_quip.hub import model_card  # noqa: F401 - imported before the forks
from transformers_quip.quantize.state import FOLDER

from .worker import logits

PATIENCE = 300  # seconds
NEIGHBOURS = ("notes.txt", "other-model")
_QUICK = ("--dtype", "float32", "--bits", "2")
_CALIBRATED = ("--num-samples", "4", "--sequence-length", "32", "--batch-size", "2", "--option", "refinement_sweeps=1")


@dataclass(frozen=True)
class Job:
    """One way to write a model.

    Attributes:
        name: of the table.
        run: writes to a folder; returns an exit code, or None.
        old: the model that is in the folder before, or None.
        atomic: whether OUT is the old or the new model at any moment, and the next run removes what is left.
        resumes: whether the next run goes on where this one was killed, and writes the bytes of an undisturbed one.
    """

    name: str
    run: Callable[[Path], Any]
    old: Path | None = None
    atomic: bool = True
    resumes: bool = False


def prepare(base: Path) -> list[Job]:
    """Make the models that are read and those that are replaced, and list the ways to write."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    tqdm.set_lock(threading.RLock())  # its own lock is shared by all processes, and a killed one would keep it
    dense, foreign_folder = base / "dense", base / "foreign"
    tiny_model("llama", num_hidden_layers=3).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    foreign.write_checkpoints("llama", foreign_folder, foreign.exl3(), {"quantization_config": {"quant_method": "exl3"}})
    source = foreign_folder / "foreign"
    models = {}
    for name, options in (("old", {"incoherence": "none"}), ("new", {"bits": 2})):
        config = QuipConfig(dataset=None, **options)
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, quantization_config=config)
        model.save_pretrained(base / name)
        model.save_pretrained(base / f"{name}-shards", max_shard_size="20KB")
        models[name] = model
    old, shards, new = base / "old", base / "old-shards", models["new"]

    def command(*arguments: Any) -> Callable[[Path], int]:
        first, *rest = map(str, arguments)
        return lambda out: cli.main([first, rest[0], str(out), *rest[1:]])

    def quantizing(name: str, *arguments: str, old: Path | None = None) -> Job:
        return Job(name, command("quantize", dense, *_QUICK, *arguments), old, atomic=False, resumes=True)

    jobs = [
        quantizing("quantize", "--dataset", "none"),
        quantizing("quantize, calibrated", *_CALIBRATED),
        quantizing("quantize --overwrite", "--dataset", "none", "--overwrite", old=old),
        quantizing("quantize, shards", "--dataset", "none", "--max-shard-size", "20KB"),
        Job("convert", command("convert", source)),
        Job("convert --overwrite", command("convert", source, "--overwrite"), old),
        Job("convert()", lambda out: convert(source, out, shard_size=20_000)),
        Job("save_pretrained", lambda out: new.save_pretrained(out), None, False),
        Job("save_pretrained, shards", lambda out: new.save_pretrained(out, max_shard_size="20KB"), None, False),
        Job("save_pretrained over a model", lambda out: new.save_pretrained(out), old, False),
        Job("save_pretrained over shards", lambda out: new.save_pretrained(out, max_shard_size="20KB"), shards, False),
    ]
    if "tune" in cli.COMMANDS:
        short = ("--num-samples", "4", "--held-out", "2", "--sequence-length", "16", "--epochs", "1", "--dtype", "float32")
        jobs.append(Job("tune", command("tune", base / "new", "--dense", dense, *short)))
        jobs.append(Job("tune --overwrite", command("tune", base / "new", "--dense", dense, *short, "--overwrite"), old))
    return jobs


class Child:
    """A forked process that calls a function; what it prints goes into a file."""

    def __init__(self, function: Callable[[], Any], log: Path):
        self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            # shells let what they start in the background ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sink = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(sink, stream)
            logging.disable(logging.NOTSET)
            result = function()
            code = result if isinstance(result, int) else 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace"))
            code = 98
        finally:
            os._exit(code)

    def has_ended(self) -> bool:
        """Whether it has; it stays to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> int:
        """Its exit code, negative for a signal. Raises `TimeoutError` if it goes on for minutes."""
        end = time.monotonic() + PATIENCE
        while not self.has_ended():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"a child goes on for more than {PATIENCE} s")
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def state(folder: Path, known: dict[str, torch.Tensor], log: Path) -> str:
    """The model that a folder holds: a name of `known`; "refused" if it does not load; "absent"; "GARBAGE"."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return "absent"
    names = list(known)

    def look() -> int:
        found = logits(folder)
        for number, name in enumerate(names):
            if found.shape == known[name].shape and torch.allclose(found, known[name], rtol=1e-4, atol=1e-4):
                return 10 + number
        return 50

    code = Child(look, log).wait()
    return names[code - 10] if 10 <= code < 50 else {50: "GARBAGE", 98: "refused"}.get(code, f"crash {code}")


def _listing(parent: Path) -> set[str]:
    return set(os.listdir(parent))


def _changed(parent: Path, out: Path) -> tuple:
    try:
        return _listing(parent), out.stat().st_mtime_ns
    except FileNotFoundError:  # it is not there, or is exchanged at this moment
        return _listing(parent), 0


def _fresh(parent: Path, job: Job) -> Path:
    """The parent of OUT with its neighbours, and with the old model in OUT."""
    shutil.rmtree(parent, ignore_errors=True)
    (parent / "other-model").mkdir(parents=True)
    (parent / "other-model" / "config.json").write_text("{}")
    (parent / "notes.txt").write_text("precious")
    if job.old is not None:
        shutil.copytree(job.old, parent / "model")
    return parent / "model"


def hashes(folder: Path) -> dict[str, str]:
    """Of every file of weights and of config.json."""
    files = [path for path in sorted(folder.glob("*")) if path.suffix == ".safetensors" or path.name == "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_once(
    job: Job,
    work: Path,
    known: dict[str, torch.Tensor],
    seconds: float,
    rng: random.Random,
    expected: dict[str, str],
) -> dict[str, Any]:
    """Kill one run of a job at a random moment, check what is there, run it again, and check again.

    Args:
        known: what the new and the old model compute.
        seconds: how long an undisturbed run takes.
        expected: the hashes of its files.
    """
    parent, log = work / "parent", work / "log"
    out = _fresh(parent, job)
    before = _changed(parent, out)
    child, begin = Child(lambda: job.run(out), log), time.monotonic()
    if rng.random() < 0.6:  # most of the time goes into loading, and most of what can go wrong into writing
        while _changed(parent, out) == before and not child.has_ended() and time.monotonic() - begin < 20 * seconds:
            time.sleep(0.0002)
        time.sleep(rng.random() ** 2 * seconds)
    else:
        time.sleep(rng.random() * 1.1 * seconds)
    os.kill(child.pid, signal.SIGKILL)
    killed = child.wait() == -signal.SIGKILL
    faults: list[str] = []
    found = state(out, known, work / "log2")
    left = sorted(_listing(parent) - {*NEIGHBOURS, "model"})
    left += [path.name for pattern in (".partial*", ".*.partial") for path in out.glob(pattern)]
    aside = [state(folder, known, work / "log2") for folder in _folders(parent, out) if (folder / "config.json").exists()]
    faults += [f"a left-over is {what}" for what in aside if what not in ("new", "old", "refused", "absent")]
    if (parent / "notes.txt").read_text() != "precious" or not (parent / "other-model" / "config.json").exists():
        faults.append("a neighbour is lost")
    allowed = {"new", *(("old",) if job.old else ("absent",)), *(() if job.atomic else ("refused", "absent"))}
    if job.name == "convert()":
        allowed |= {"refused"}  # its work folder is in OUT, which has no config.json
    if found not in allowed and not (job.atomic and found == "absent" and "old" in aside):
        faults.append(f"OUT is {found}")
    complete = job.atomic or (job.resumes and not (out / FOLDER).exists())
    if found == "new" and complete and job.old is None:
        faults += _again(job, out, log, refused=True)
    else:
        faults += _again(job, out, log, refused=False)
        said = log.read_text(errors="replace")
        after = state(out, known, work / "log2")
        if after != "new":
            faults.append(f"OUT is {after} after the next run: {said[-300:]}")
        faults += [f"{name} is not named by the next run" for name in left if name not in said]
        if job.resumes and hashes(out) != expected:
            faults.append("the bytes differ from those of an undisturbed run")
    faults += [f"{name} is still there" for name in sorted(_listing(parent) - {*NEIGHBOURS, "model"})]
    faults += [f"{path.name} is still in OUT" for path in out.glob(".*") if path.name == FOLDER or "partial" in path.name]
    return {"job": job.name, "killed": killed, "found": found, "left": len(left), "faults": faults}


def _again(job: Job, out: Path, log: Path, refused: bool) -> list[str]:
    """Run a job to its end. `refused`: the complete model is there, and is not to be replaced."""
    code = Child(lambda: job.run(out), log).wait()
    if refused and code == 0:
        return ["the next run replaced a complete model without being asked"]
    if not refused and code != 0:
        return [f"the next run ends with {code}: {log.read_text(errors='replace')[-300:]}"]
    return []


def _folders(parent: Path, out: Path) -> list[Path]:
    """Folders that a run may have left, beside OUT and in it, and those in them."""
    beside = [path for path in parent.iterdir() if path.is_dir() and path.name not in NEIGHBOURS and path != out]
    inside = [path for path in out.iterdir() if path.is_dir()] if out.is_dir() else []
    deeper = [path for folder in beside for path in folder.iterdir() if path.is_dir()]
    return [*beside, *inside, *deeper]


def run(count: int, seed: int, work: Path, only: str = "") -> list[dict[str, Any]]:
    """`count` kills, of all jobs in turn; runs that ended before they were killed come on top."""
    logging.disable(logging.WARNING)
    base = work / "models"
    base.mkdir()
    jobs = [job for job in prepare(base) if only in job.name]
    known: dict[str, dict[str, torch.Tensor]] = {}
    seconds: dict[str, float] = {}
    expected: dict[str, dict[str, str]] = {}
    for job in jobs:
        out, begin = _fresh(work / "parent", job), time.monotonic()
        if Child(lambda job=job, out=out: job.run(out), work / "log").wait():
            raise RuntimeError(f"{job.name} fails undisturbed: {(work / 'log').read_text()[-2000:]}")
        seconds[job.name] = time.monotonic() - begin
        expected[job.name] = hashes(out)
        known[job.name] = {"new": logits(out)} | ({"old": logits(job.old)} if job.old else {})
    rng, records, kills, number = random.Random(seed), [], 0, 0
    while kills < count:
        job = jobs[number % len(jobs)]
        records.append(kill_once(job, work, known[job.name], seconds[job.name], rng, expected[job.name]))
        kills += records[-1]["killed"]
        number += 1
        if number > 20 * count + 100:
            raise RuntimeError("the runs end before they are killed")
    return records


def table(records: list[dict[str, Any]]) -> str:
    """What was found after the kills, by job, as a table of Markdown."""
    words = sorted({record["found"] for record in records})
    rows = [("job", "kills", *words, "left something", "faults"), ("---",) * (len(words) + 4)]
    for name in (*dict.fromkeys(record["job"] for record in records), "all"):
        these = [record for record in records if name in (record["job"], "all") and record["killed"]]
        found = Counter(record["found"] for record in these)
        left, faults = sum(record["left"] > 0 for record in these), sum(bool(record["faults"]) for record in these)
        rows.append((name, *map(str, (len(these), *(found[word] for word in words), left, faults))))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts that are published."""
    kills = [record for record in records if record["killed"]]
    return {
        "kills": len(kills),
        "jobs": {name: sum(record["job"] == name for record in kills) for name in sorted({r["job"] for r in kills})},
        "found": dict(Counter(record["found"] for record in kills)),
        "left_something": sum(record["left"] > 0 for record in kills),
        "faults": sum(bool(record["faults"]) for record in records),
    }


def main() -> int:
    """Returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=44)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="part of a job's name")
    parser.add_argument("--log", type=Path, help="a file for every record, one line of JSON each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quip-kill-") as work:
        records = run(options.count, options.seed, Path(work), options.only)
    print("\n" + table(records))
    faults = Counter(f"{record['job']}: {fault}" for record in records for fault in record["faults"])
    for fault, times in faults.most_common():
        print(f"{times} × {fault}")
    if options.log:
        options.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
