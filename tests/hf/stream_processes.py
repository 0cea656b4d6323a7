"""What each process does in test_stream_processes.py.

torchrun --nproc-per-node 2 tests/hf/stream_processes.py DENSE OUT WAY
"""

from __future__ import annotations

import os
import signal
import sys

import torch

import transformers_quip
from tests.models import tiny_ids
from transformers_quip import QuipConfig
from transformers_quip.calibration import experts, processes
from transformers_quip.quantize import block

IDS = tiny_ids(9, 24)
OPTIONS = {"num_samples": 9, "sequence_length": 24, "batch_size": 2, "refinement_sweeps": 0}
WAYS = {
    "mixed": {"dataset": IDS},
    "self and average": {"dataset": "self", "bits": 2.5, "modules": {"lm_head": {"bits": 4}}},
    "experts": {"dataset": IDS},
    "killed": {"dataset": IDS},
}


def config(way: str) -> QuipConfig:
    return QuipConfig(**{**OPTIONS, **WAYS[way]})


def main(dense: str, out: str, way: str) -> None:
    torch.set_num_threads(1)
    processes.join()
    if os.environ.get("BUDGET"):
        experts.ExpertHessians.__init__.__defaults__ = ("", int(os.environ["BUDGET"]))
    if way == "killed" and processes.rank() == 1:
        real = block._round_together
        count = 0

        def round_together(*arguments):
            nonlocal count
            count += 1
            if count == 2:  # in the middle of the second block
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        block._round_together = round_together
    transformers_quip.quantize(dense, out, config(way))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
