"""What each of two processes does in test_processes.py: tunes one tiny model in every way.

torchrun --nproc-per-node 2 tests/finetune/two_processes.py RESULTS
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.finetune.conftest import IDS, pair
from transformers_quip.finetune import TuneOptions, end_to_end, processes, product, record, student, teacher, tune_vectors
from transformers_quip.finetune import memory as memory_module

OPTIONS = TuneOptions(epochs=3, batch_size=4, held_out=5, learning_rate=2e-2, looks=4)
WAYS = {
    "whole": {},
    "sharded": {"shard": True},
    "low memory": {"memory": "low"},
    "sharded, low memory": {"shard": True, "memory": "low"},
}


def exact() -> None:
    """As the fixture of this name: products in float32."""
    for module in (memory_module, product, student, teacher, end_to_end):
        module.product_dtype = lambda device: torch.float32


def tune(memory: str = "auto", **options) -> dict:
    """The history of a run with the sum of the tuned vectors, which differ if anything differed."""
    dense, model = pair("llama")
    chosen = dataclasses.replace(OPTIONS, memory=memory)
    report = tune_vectors(model, record(dense, IDS[:21], progress=False), chosen, progress=False, **options)
    vectors = {n: p for n, p in model.named_parameters() if p.is_floating_point() and p.ndim == 1}
    assert not any("FSDP" in type(module).__name__ for module in model.modules())
    return {
        "train": [look["train"] for look in report.history],
        "held_out": [look["held_out"] for look in report.history],
        "before": report.verdict.before,
        "after": report.verdict.after,
        "kept": report.verdict.accepted,
        "vectors": {name: value.tolist() for name, value in vectors.items()},
    }


def main(results: Path) -> None:
    exact()
    assert processes.join().num_processes == 2
    found = {way: tune(**options) for way, options in WAYS.items()}
    first = processes.is_first()
    state = results / "state"
    found["resumed"] = tune(state=state)
    found["files"] = sorted(path.name for path in state.iterdir())
    found["resumed again"] = tune(state=state)
    found["mine"] = processes.mine([1, 2, 3, 4, 5])
    found["joined"] = processes.joined(torch.tensor(found["mine"]), 5).tolist()
    found["from first"] = processes.from_first(lambda: "first" if first else "other")
    marker = results / "marker"
    found["marker was there"] = processes.first_before_others(lambda: (marker.exists(), marker.write_text("x"))[0])
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of the 2 processes"):
        tune_vectors(*reversed(odd()), TuneOptions(batch_size=3, held_out=5))
    (results / f"{0 if first else 1}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def odd():
    dense, model = pair("llama")
    return record(dense, IDS[:21], progress=False), model


if __name__ == "__main__":
    main(Path(sys.argv[1]))
