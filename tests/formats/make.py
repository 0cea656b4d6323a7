"""Writes the tiny saved models beside this file, one for each codebook, and the dense weights that they stand for.

    python tests/formats/make.py [FOLDER ...]

Codes are random, and the dense weights are computed in float64 by `tests/truth.py`, which is written from the formats'
description: nothing here uses the package. The files pin the native format (format_version 1): a change of the package
that reads them differently is a new version of the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tests import truth  # noqa: E402

HIDDEN, VOCABULARY = 16, 16
LAYER = "model.layers.0."
BITS = {"e8p": 2, "e8p-rvq3": 3, "e8p-rvq4": 4, "d4": 2, **truth.SCALAR_BITS}


class Model(NamedTuple):
    """One saved model: the codebook of most linears, what multiplies its second stage where that is not the codebook's own,
    the codebooks of others, and sizes.

    20 inputs are neither a power of two nor whole blocks of 8, and 3 bits each are not whole bytes.
    """

    codebook: str
    residual_scale: float | None = None
    others: dict[str, str] = {}  # noqa: RUF012 - never written
    intermediate: int = 20
    key_value: int = 8

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name in the layer → [m, n]."""
        shapes = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN))
        shapes |= {f"self_attn.{name}_proj": (self.key_value, HIDDEN) for name in "kv"}
        shapes |= {f"mlp.{name}_proj": (self.intermediate, HIDDEN) for name in ("gate", "up")}
        shapes["mlp.down_proj"] = (HIDDEN, self.intermediate)
        return {name: shapes[name] for name in TRELLISES}


# Every trellis code but "lut", whose table alone would be 256 KB, with every number of bits and order that there is.
TRELLISES = {
    "self_attn.q_proj": "trellis:1mad:k2:rows",
    "self_attn.k_proj": "trellis:2mad:k4:rows",
    "self_attn.v_proj": "trellis:3inst:k1:exl3",
    "self_attn.o_proj": "trellis:mcg:k5:exl3",
    "mlp.gate_proj": "trellis:mul1:k8:exl3",
    "mlp.up_proj": "trellis:hyb-q9v2:k3:qtip",
    "mlp.down_proj": "trellis:quantlut-q4v1:k7:rows",
}
FOLDERS = {
    **{name: Model(name) for name in BITS},
    "e8p-rvq4-minus": Model("e8p-rvq4", -1.0),
    "embeddings": Model("e8p", others={"model.embed_tokens": "half-integer", "lm_head": "e8p-rvq3"}),
    "trellis": Model(
        "trellis:1mad:k2:rows", others={LAYER + n: b for n, b in TRELLISES.items()}, intermediate=32, key_value=16
    ),
}


def bits(codebook: str) -> int:
    """Of its codes for each weight."""
    return int(codebook.split(":")[2][1:]) if codebook.startswith("trellis") else BITS[codebook]


def model_config(model: Model) -> dict:
    """config.json."""
    quantized = [*(name for name in model.others if not name.startswith(LAYER)), *(LAYER + name for name in model.linears)]
    quantization = {
        "quant_method": "quip",
        "format_version": 1,
        "bits": bits(model.codebook),
        "codebook": model.codebook,
        "residual_scale": model.residual_scale,
        "incoherence": "hadamard",
        "seed": 0,
        "quantized_modules": quantized,
    }
    if model.others:
        quantization["modules"] = {name: {"codebook": book} for name, book in model.others.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": model.key_value // 8,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "tie_word_embeddings": "lm_head" not in model.others,
        "quantization_config": quantization,
    }


def dense_weight(parts: dict[str, torch.Tensor], name: str, quantization: dict) -> torch.Tensor:
    """What the tensors of one module stand for, float64; `quantization` as in config.json."""
    book = (quantization.get("modules") or {}).get(name, {}).get("codebook", quantization["codebook"])
    scale = quantization["residual_scale"] if book == quantization["codebook"] else None
    sides = "input side" if name.endswith("embed_tokens") else quantization["incoherence"]
    return truth.dense_weight(**parts, incoherence=sides, codebook=book if scale is None else f"{book}@{scale}")


def main() -> None:
    for number, (folder, model) in enumerate(FOLDERS.items()):
        if sys.argv[1:] and folder not in sys.argv[1:]:
            continue
        generator = torch.Generator().manual_seed(number)
        tensors = {
            "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
            "model.norm.weight": torch.ones(HIDDEN),
            "model.layers.0.input_layernorm.weight": torch.ones(HIDDEN),
            "model.layers.0.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        config, expected = model_config(model), {}
        shapes = {LAYER + name: shape for name, shape in model.linears.items()}
        shapes |= {name: (VOCABULARY, HIDDEN) for name in model.others if not name.startswith(LAYER)}
        for i, (name, (m, n)) in enumerate(shapes.items()):
            parts = truth.random_linear(m, n, seed=100 * number + i, codebook=model.others.get(name, model.codebook))
            del parts["bias"]
            weight = dense_weight(parts, name, config["quantization_config"])
            expected[name.removeprefix(LAYER)] = weight.float().contiguous()
            tensors.pop(f"{name}.weight", None)
            tensors.update((f"{name}.{key}", value) for key, value in parts.items())
        (HERE / folder).mkdir(exist_ok=True)
        save_file(tensors, HERE / folder / "model.safetensors", {"format": "pt"})
        save_file(expected, HERE / folder / "expected.safetensors")
        (HERE / folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
