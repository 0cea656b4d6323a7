"""Writes the tiny saved models beside this file, one for each codebook, and the dense weights that they stand for.

    python tests/formats/make.py

Codes are random, and the dense weights are computed in float64 by `tests/truth.py`, which is written from the formats'
description: nothing here uses the package. The files pin the native format (format_version 1): a change of the package
that reads them differently is a new version of the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tests import truth  # noqa: E402

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 16, 20, 8, 16
# 20 inputs are neither a power of two nor whole blocks of 8, and 3 bits each are no whole bytes.
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BITS = {"e8p": 2, "e8p-rvq3": 3, "e8p-rvq4": 4, "d4": 2, **truth.SCALAR_BITS}
# folder → codebook and what multiplies its second stage, where that is not the codebook's own
FOLDERS = {name: (name, None) for name in BITS} | {"e8p-rvq4-minus": ("e8p-rvq4", -1.0), "embedding": ("e8p", None)}
# folder → codebook of the embeddings and the output embeddings
EMBEDDINGS = {"embedding": "half-integer"}


def model_config(codebook: str, residual_scale: float | None, embeddings: str | None) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "tie_word_embeddings": embeddings is None,
        "quantization_config": {
            "quant_method": "quip",
            "format_version": 1,
            "bits": BITS[codebook],
            "codebook": codebook,
            "residual_scale": residual_scale,
            "incoherence": "hadamard",
            "seed": 0,
            **({"modules": dict.fromkeys(("embed_tokens", "lm_head"), {"codebook": embeddings})} if embeddings else {}),
            "quantized_modules": [
                *(["model.embed_tokens", "lm_head"] if embeddings else []),
                *(f"model.layers.0.{name}" for name in LINEARS),
            ],
        },
    }


def main() -> None:
    for number, (folder, (codebook, residual_scale)) in enumerate(FOLDERS.items()):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
            "model.norm.weight": torch.ones(HIDDEN),
            "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN),
            "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        expected = {}
        embeddings = EMBEDDINGS.get(folder)
        if embeddings:
            del tensors["model.embed_tokens.weight"]
            for name in ("model.embed_tokens", "lm_head"):
                parts = truth.random_linear(VOCABULARY, HIDDEN, seed=number, codebook=embeddings)
                del parts["bias"]
                rotation = truth.ONE_SIDED if name == "model.embed_tokens" else "hadamard"
                weight = truth.dense_weight(**parts, incoherence=rotation, codebook=embeddings)
                expected[name] = weight.float().contiguous()
                tensors.update((f"{name}.{key}", value) for key, value in parts.items())
        for i, (name, (m, n)) in enumerate(LINEARS.items()):
            parts = truth.random_linear(m, n, seed=100 * number + i, codebook=codebook)
            del parts["bias"]
            weight = truth.dense_weight(**parts, codebook=codebook, residual_scale=residual_scale)
            expected[f"model.layers.0.{name}"] = weight.float().contiguous()
            tensors.update((f"model.layers.0.{name}.{key}", value) for key, value in parts.items())
        (HERE / folder).mkdir(exist_ok=True)
        save_file(tensors, HERE / folder / "model.safetensors", {"format": "pt"})
        save_file(expected, HERE / folder / "expected.safetensors")
        text = json.dumps(model_config(codebook, residual_scale, embeddings), indent=1)
        (HERE / folder / "config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
