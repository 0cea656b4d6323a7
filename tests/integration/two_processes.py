"""What each of two processes does in test_distributed.py: trains adapters on a quantized model in every way at once.

torchrun --nproc-per-node 2 tests/integration/two_processes.py FOLDER RESULTS
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
from pathlib import Path

import torch

STEPS = 3
RATE = 0.05


def adapted(folder: str):
    """The quantized model with adapters that are the same in every process."""
    import peft
    from transformers import AutoModelForCausalLM

    import transformers_quip  # noqa: F401 - registers the method

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def rows() -> torch.Tensor:
    """Token ids [4, 16]."""
    return torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))


def train(model, ids: torch.Tensor, backward=torch.Tensor.backward) -> list[float]:
    """The loss before each step of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def trainer_runs() -> bool:
    """Whether Transformers' Trainer can use this release of accelerate: it passes an argument that 1.1 does not have."""
    from accelerate import Accelerator

    return "keep_torch_compile" in inspect.signature(Accelerator.unwrap_model).parameters


def with_trainer(folder: str, output: Path) -> list[float]:
    """The losses that transformers.Trainer logs, of all processes together."""
    from transformers import Trainer, TrainingArguments

    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=4 // world,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
    )
    data = [{"input_ids": row, "labels": row} for row in rows()]
    trainer = Trainer(adapted(folder), arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def codes_differ(model) -> bool:
    """Whether any process has other codes than the first."""
    codes = [p for n, p in model.named_parameters() if not p.is_floating_point()]
    sums = torch.tensor([code.double().sum() for code in codes])
    first = sums.clone()
    torch.distributed.broadcast(first, 0)
    return not torch.equal(first, sums)


def main(folder: str, results: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    half = rows().chunk(2)[rank]
    found = {}

    model = adapted(folder)
    if rank:
        for parameter in model.parameters():
            parameter.data.zero_()
    found["codes differed"] = codes_differ(model)
    found["ddp"] = train(DistributedDataParallel(model), half)
    found["codes differ after DDP"] = codes_differ(model)

    model = adapted(folder)
    try:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    except RuntimeError as error:  # PyTorch 2.9 asks for gradients of every sharded parameter, integers too
        if "floating point dtype can require gradients" not in str(error):
            raise
        found["fsdp2"] = None
    else:
        found["fsdp2"] = train(model, half)

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found["accelerate"] = train(accelerator.prepare(adapted(folder)), half, accelerator.backward)
    found["trainer"] = with_trainer(folder, results / "trainer") if trainer_runs() else None

    for dtype in (torch.int16, torch.uint16):
        tensor = (torch.arange(6) + (300 if rank == 0 else 0)).to(dtype)
        dist.broadcast(tensor, 0)
        found[str(dtype)] = tensor.tolist()
    (results / f"{rank}.json").write_text(json.dumps(found))
    # Neither process may end while the other one, or a wrapper of a model, still uses the group.
    del model, accelerator
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
