"""What each of two processes does in test_expert_parallel.py: holds half of the experts of a quantized model.

torchrun --nproc-per-node 2 tests/integration/two_expert_processes.py FOLDER RESULTS
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import torch


def main(folder: str, results: Path) -> None:
    """Write the logits of a few tokens, and which part of each parameter is here."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import transformers_quip  # noqa: F401 - registers the method

    torch.set_num_threads(1)
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers_quip").addHandler(handler)
    parallel = DistributedConfig(tp_size=2, ep_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel)
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
    experts = model.model.layers[0].mlp.experts
    shards = {name: list(p.to_local().shape) for name, p in experts.named_parameters()}
    rank = int(os.environ["RANK"])
    content = {"logits": logits.tolist(), "shards": shards, "experts": experts.num_experts, "warned": warned}
    (results / f"{rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
