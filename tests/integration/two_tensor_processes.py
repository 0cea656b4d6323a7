"""What each of two processes does in test_tensor_parallel.py: holds a share of every quantized linear.

torchrun --nproc-per-node 2 tests/integration/two_tensor_processes.py FOLDER RESULTS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch


def main(folder: str, results: Path) -> None:
    """Write the logits of a few tokens, what they generate, and the shapes that this process holds."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    import transformers_quip  # noqa: F401 - registers the method

    torch.set_num_threads(1)
    parallel = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=parallel).eval()
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, min_new_tokens=8
        )
    shapes = {name: list((p.to_local() if isinstance(p, DTensor) else p).shape) for name, p in model.named_parameters()}
    model.train()
    try:
        model(ids)
        said = ""
    except RuntimeError as error:
        said = str(error)
    content = {"logits": logits.tolist(), "tokens": tokens.tolist(), "shapes": shapes, "said": said}
    (results / f"{os.environ['RANK']}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
