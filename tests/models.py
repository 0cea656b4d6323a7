"""Tiny causal language models with random weights, one for each module tree that the project must cope with.

`tiny_model(arch)` builds one in a few milliseconds, always with the same weights for the same seed. The sizes are
small, but not all powers of two, so that a Hadamard transform of order K * 2^p with K > 1 is met on the way.
"""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 128
HIDDEN = 64
INTERMEDIATE = 96
LAYERS = 2
HEADS = 4
KEY_VALUE_HEADS = 2
POSITIONS = 128

# what every config shares, under the names most of them use
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": KEY_VALUE_HEADS}

# arch -> (Transformers' model_type, config fields). The module trees differ as the comments say.
_CONFIGS: dict[str, tuple[str, dict]] = {
    # nn.Linear without bias, separate q/k/v and gate/up, untied head
    "llama": ("llama", {**_COMMON, **_GROUPED, "tie_word_embeddings": False}),
    # norms on q and k; head_dim * heads != hidden; tied head
    "qwen3": ("qwen3", {**_COMMON, **_GROUPED, "head_dim": 24, "tie_word_embeddings": True}),
    # one sliding-window and one full-attention layer with different rotary tables; tied head
    "gemma3": (
        "gemma3_text",
        {
            **_COMMON,
            **_GROUPED,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    # fused qkv_proj and gate_up_proj
    "phi3": ("phi3", {**_COMMON, **_GROUPED, "tie_word_embeddings": False}),
    # Conv1D (transposed weight) with bias, fused c_attn; learned positions; tied head
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_inner": INTERMEDIATE,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    # nn.Linear with bias; learned positions; tied head
    "opt": (
        "opt",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "ffn_dim": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": HIDDEN,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    # nn.Linear with bias, fused query_key_value, parallel residual; the head is called embed_out
    "gpt_neox": ("gpt_neox", {**_COMMON, "rotary_pct": 0.25, "tie_word_embeddings": False}),
    # experts are 3-D parameters, not nn.Linear
    "mixtral": (
        "mixtral",
        {
            **_COMMON,
            **_GROUPED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)

# further module trees that checkpoints of other packages have
_CONFIGS |= {
    "mistral": ("mistral", {**_COMMON, **_GROUPED, "sliding_window": None, "tie_word_embeddings": False}),
    # a bias in q, k and v only; tied head
    "qwen2": ("qwen2", {**_COMMON, **_GROUPED, "tie_word_embeddings": True}),
    # 3-D experts, beside a shared one and a dense layer
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_COMMON,
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
            "tie_word_embeddings": False,
        },
    ),
    # into these two exllamav3 folds factors: 3-D experts, beside a shared one, after a dense layer
    "laguna": (
        "laguna",
        {
            **_COMMON,
            **_GROUPED,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            "tie_word_embeddings": False,
        },
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            **_COMMON,
            **_GROUPED,
            "head_dim": 24,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
        },
    ),
}


def tiny_config(arch: str, **overrides):
    """Return the config of a tiny model of `arch` (a key of _CONFIGS); `overrides` replace its fields."""
    if arch not in _CONFIGS:
        raise ValueError(f"unknown tiny architecture {arch!r}; known: {', '.join(_CONFIGS)}")
    model_type, fields = _CONFIGS[arch]
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def tiny_model(arch: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """Return a tiny random causal model of `arch` in eval mode, the same for the same seed.

    Weights are drawn much larger than Transformers initialises them, so that the logits of two models differ visibly
    when their weights do; biases and norms are moved off their initial 0 and 1 so that losing one shows.
    """
    config = tiny_config(arch, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    model.tie_weights()
    return model.to(dtype).eval()


def tiny_ids(samples: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Return random token ids [samples, length] (int64) for the tiny models; special tokens 0-2 do not occur."""
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def save_tiny_model(arch: str, folder, **arguments) -> str:
    """Save `tiny_model(arch, **arguments)` under `folder` and return its path as from_pretrained takes it."""
    tiny_model(arch, **arguments).save_pretrained(folder)
    return str(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer without training data: every character of ASCII is its code, all others are token 0.

    Its ids fit the tiny models' vocabulary; 0, 1 and 2 are the special tokens the tiny configs name.
    """
    vocabulary = {chr(code): code for code in range(3, VOCABULARY)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
