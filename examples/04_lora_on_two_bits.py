"""Train LoRA adapters (PEFT) on top of a quantized model: the 2-bit weights stay frozen, the adapters learn a text.

    python examples/04_lora_on_two_bits.py FOLDER [--text FILE] [--steps 20] [--dense DENSE]

FOLDER is a quantized model, such as example 01 saves. With --dense, the model that was quantized, the adapters begin with
the error of the quantized weights instead of zero. docs/adapters.md says how adapters are merged.

Output for a tiny model with random weights (loss in nats per token on the training text):

    trainable: 7,424 of 33,664 stored parameters
    step  1: loss 5.67
    step  5: loss 3.86
    step 10: loss 3.21
    step 15: loss 2.80
    step 20: loss 2.47
    the adapters take 33.2 kB in tiny-2bit-lora
    reloaded: the same logits
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_quip.peft import residual_init

TEXT = "In the beginning there were two bits, and the two bits were enough. " * 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a quantized model")
    parser.add_argument("--dense", help="the dense model: the adapters begin with the error of the quantized weights")
    parser.add_argument("--text", type=Path, help="training text; a sentence by default")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--length", type=int, default=128, help="tokens in one step")
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    text = options.text.read_text(encoding="utf-8") if options.text else TEXT
    ids = tokenizer(text, return_tensors="pt")["input_ids"]

    # "all-linear" finds the quantized linears: they are nn.Linear to PEFT
    adapted = get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if options.dense:
        residual_init(adapted, options.dense)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    total = sum(parameter.numel() for parameter in adapted.parameters())
    print(f"trainable: {sum(p.numel() for p in trainable):,} of {total:,} stored parameters")

    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate)
    adapted.train()
    for step in range(1, options.steps + 1):
        begin = (step - 1) * options.length % max(ids.shape[1] - options.length, 1)
        window = ids[:, begin : begin + options.length]
        loss = adapted(window, labels=window).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, options.steps) or step % 5 == 0:
            print(f"step {step:2d}: loss {loss.item():.2f}")

    output = options.folder.with_name(f"{options.folder.name}-lora")
    adapted.eval().save_pretrained(output)
    size = (output / "adapter_model.safetensors").stat().st_size
    print(f"the adapters take {size / 1e3:.1f} kB in {output.name}")

    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.folder), output).eval()
    with torch.no_grad():
        if not torch.equal(fresh(ids[:, :16]).logits, adapted(ids[:, :16]).logits):
            raise SystemExit("the reloaded adapters compute something else")
    print("reloaded: the same logits")


if __name__ == "__main__":
    main(arguments())
