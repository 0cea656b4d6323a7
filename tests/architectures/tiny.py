"""A tiny random model of any architecture of Transformers: its config class, shrunk by the names of its fields."""

from __future__ import annotations

import dataclasses
import re

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

VOCAB = 256
# (regular expression of a field's whole name, value); the first that matches is used, and never makes a field larger.
RULES: list[tuple[str, int]] = [
    (r"type_vocab_size|pretraining_tp|num_nextn_predict_layers|num_mtp_layers|num_labels", -1),  # leave
    (r".*vocab_size.*|n_words|vocab_offset|input_vocab.*", VOCAB),
    (
        r"(num_)?(local_|routed_|moe_)?(n_)?(num_)?(routed_|local_)?experts|moe_num_experts|zero_expert_num|"
        r".*num_experts",
        4,
    ),
    (r"n_shared_experts|num_shared_experts?|moe_num_shared_experts|num_experts_shared", 1),
    (
        r"num_experts_per_tok.*|moe_topk|moe_k|num_selected_experts|moe_top_k|top_k_experts|router_top_k|"
        r"experts_top_k",
        2,
    ),
    (r"n_group|topk_group|num_expert_groups?|num_limited_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (
        r"(text_|expert_|moe_|shared_|shared_expert_|moe_shared_expert_|dense_|conf_)*(intermediate_size|"
        r"ffn_hidden_size)(_mlp)?",
        96,
    ),
    (
        r"intermediate_dim|dff|ffn_dim|.*_ffn_dim|n_inner|d_ff|d_inner|dim_ff|feed_forward_size|mlp_dim|"
        r"expert_dim|prompt_mid_dim|mlp_hidden_size",
        96,
    ),
    (
        r"(num_|n_|decoder_|encoder_|num_encoder_|num_decoder_|num_hidden_|"
        r"conf_num_hidden_)(hidden_)?(layers?|blocks)",
        2,
    ),
    (r"depth|num_layers_per_stack|num_global_layers|num_block_layers", 2),
    (
        r"(num_|swa_num_|conf_num_|encoder_|decoder_|num_encoder_|num_decoder_|text_)*(key_value_heads|"
        r"kv_heads|kv_n_heads)|num_key_value_heads",
        2,
    ),
    (r"mamba_n_heads|mamba_num_heads|mamba2?_heads", 8),
    (r"index_n_heads|indexer_n_heads", 2),
    (
        r"(num_|n_|swa_num_|conf_num_|encoder_|decoder_|num_encoder_|num_decoder_|attention_|"
        r"linear_num_)*(attention_|key_|value_)?heads?",
        4,
    ),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"index_head_dim|indexer_head_dim", 16),
    (
        r".*head_dim|d_kv|d_head|kv_channels|attention_head_size|attention_key_size|mamba_d_head|v_head_dim|"
        r"dim_head|qk_head_dim|global_head_dim|swa_head_dim|v_channels",
        16,
    ),
    (r"(kv|q|o)_lora_rank|adapter_rank|laurel_rank|hc_lowrank|d_rel", 32),
    (r"hidden_size_per_layer_input|ple_embed_dim", 32),
    (r"num_kv_shared_layers", 0),
    (
        r"(.*_)?hidden_size(_.*)?|d_model|n_embd|hidden_dim|.*embed_dim|dim|dim_model|.*embedding_size|"
        r".*embedding_dim|embedding_dim|emb_dim|attention_hidden_size|lru_width|projection_dim|out_dim|"
        r"output_dim|.*_output_dim|.*output_proj_dims|output_channels|projector_.*_dim|.*embed_proj_dim|"
        r"text_hidden|adapter_out_dim|model_dim|cross_attention_dim|word_embed_proj_dim|backbone_hidden_size|"
        r"resampler_hidden|d_text",
        64,
    ),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|"
        r"max_source_positions|max_length|original_max_position_embeddings|max_sequence_length",
        128,
    ),
    (
        r"rel_extent|max_window_layers|relative_max_distance|position_embedding_size|num_position_embeddings|"
        r"mm_posemb_size",
        64,
    ),
    (r"sliding_window.*size|sliding_window|attention_window_size|local_attention|window_size|attention_chunk_size", 16),
    (r"state_size|mamba_d_state|ssm_state_size|d_state", 16),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"chunk_size|mamba_chunk_size", 16),
    (r"image_size|crop_size", 32),
    (r"index_topk|index_topk_blocks", 16),
    (r"patch_size", 8),
    (r"num_mel_bins|num_mel_bands", 16),
    (r"mm_tokens_per_image|image_seq_length|vision_soft_tokens_per_image", 4),
]
LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types", "mtp_layer_types")

# What the rules cannot know.
_MLA = {"num_key_value_heads": 4}  # these expand the keys to every head
OVERRIDES: dict[str, dict] = {
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA
    ),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "minicpm3", "youtu"), _MLA),
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _MLA
    | {f"swa_{n}": v for n, v in (("num_attention_heads", 4), ("num_key_value_heads", 4), ("q_lora_rank", 32))}
    | {f"swa_{n}": v for n, v in (("kv_lora_rank", 32), ("head_dim", 24), ("qk_nope_head_dim", 16), ("v_head_dim", 16))},
    "gemma3n_text": {"intermediate_size": [96, 96], "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 24, "num_key_value_heads": 4, "head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 48),
        "attn_layers": ("local", "lsh"),
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    **{t: {"is_decoder": True} for t in ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra")},
    **{t: {"is_decoder": True} for t in ("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm")},
    **{t: {"is_decoder": True} for t in ("roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl")},
}
OVERRIDES["xmod"]["is_decoder"] = True
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
for _type in (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "glm4v_text",
    "glm46v_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
):
    OVERRIDES[_type] = _MROPE
OVERRIDES["glm4v_moe_text"] = {
    "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
}
for _type in ("mistral4", "mistral4_text", "mistral_large4_text", "mistral_large4"):
    OVERRIDES[_type] = _MLA
OVERRIDES["deepseek_v2"] = _MLA | {"num_experts_per_tok": 2}


def _rule(name: str, default: object) -> object:
    """The value of a field in a tiny config: never larger than the default."""
    for pattern, value in RULES:
        if re.fullmatch(pattern, name):
            if value < 0 or not isinstance(default, int) or isinstance(default, bool):
                return default
            return min(default, value)
    return default


def _get(config: PreTrainedConfig, field: dataclasses.Field) -> object:
    """The value of a field."""
    try:
        return getattr(config, field.name, None)
    except Exception:  # an attribute that differs from layer to layer
        return field.default


def _tokens(fields: dict[str, object]) -> dict[str, object]:
    """Small, distinct token ids."""
    ids, special = {}, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    following = iter(range(VOCAB - 4, 100, -1))
    for name, value in fields.items():
        if not re.fullmatch(r".*token_(id|index|idx)|(pad|bos|eos|unk|mask)_index", name):
            continue
        if name in special:
            ids[name] = special[name]
        elif isinstance(value, int) and value > 9:
            ids[name] = next(following)
    return ids


def _layer_lists(full: PreTrainedConfig, names: set[str]) -> dict[str, object]:
    """Lists with one entry a layer: the fewest layers that show every combination of kinds (at least 2, at most 6)."""
    lists = {n: list(getattr(full, n)) for n in LISTS if n in names and isinstance(getattr(full, n, None), (list, tuple))}
    lists = {n: v for n, v in lists.items() if v and not n.startswith("mtp")}
    if not lists:
        return {}
    length = min(map(len, lists.values()))
    seen, rows = set(), []
    for row in zip(*(v[:length] for v in lists.values()), strict=True):
        if row not in seen and len(rows) < 6:
            seen.add(row)
            rows.append(row)
    while len(rows) < 2:
        rows.append(rows[0])
    return {n: [row[i] for row in rows] for i, n in enumerate(lists)}


def tiny_config(model_type: str, cls: type[PreTrainedConfig] | None = None, **overrides: object) -> PreTrainedConfig:
    """The config of a tiny model.

    Args:
        model_type: as Transformers calls the architecture.
        cls: the config class, if it is not the one that Transformers has for this type (a part of another config).
        overrides: fields that are set last; `...` leaves one out.
    """
    cls = cls or CONFIG_MAPPING[model_type]
    full = cls()
    fields = {f.name: _get(full, f) for f in dataclasses.fields(cls) if f.init}
    base = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    declared = {f.name: f.default for f in dataclasses.fields(cls)}
    kwargs: dict[str, object] = {}
    for name, value in fields.items():
        if name in base or name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = tiny_config(value.model_type, type(value))
        elif declared[name] is not None and (new := _rule(name, value)) != value:
            kwargs[name] = new
    kwargs |= _tokens(fields)
    kwargs |= (lists := _layer_lists(full, set(fields)))
    if lists:
        reverse = cls.attribute_map or {}
        name = reverse.get("num_hidden_layers", "num_hidden_layers")
        if name in fields:
            kwargs[name] = len(next(iter(lists.values())))
    if "num_key_value_heads" in fields and not isinstance(fields["num_key_value_heads"], list):
        kwargs.setdefault("num_key_value_heads", 2)
    kwargs |= OVERRIDES.get(model_type, {}) | overrides
    kwargs = {k: v for k, v in kwargs.items() if v is not ...}
    return cls(**kwargs)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of matrices drawn so large that an error in one shows; the rest as Transformers initialises it."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) in done or not p.is_floating_point():
                continue
            done.add(id(p))
            if isinstance(module, torch.nn.Embedding):
                p.copy_(torch.randn(p.shape, generator=generator))
            elif isinstance(module, (torch.nn.Linear, Conv1D)) and p.ndim == 2:
                fan_in = p.shape[0] if isinstance(module, Conv1D) else p.shape[1]
                p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5)
            elif p.ndim == 3 and type(module).__module__.partition(".")[0] != "torch":
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
            elif not p.isfinite().all() or p.abs().max() > 1e4:  # left uninitialised by the architecture
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
