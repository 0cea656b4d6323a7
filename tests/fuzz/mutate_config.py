"""Mutations of what a checkpoint says of itself: config.json, quantization_config.json, quip_evaluation.json, the card."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

from .mutations import HOSTILE, at, dump, mutation, places, read, shown

PARTS = ("quantization_config", "quip_params")
_KEYS = (
    "layout", "modules", "residual_scale", "foreign", "origin", "calibration", "quantized_modules", "format_version",
    "seed",
    "lora_rank", "outlier_channel_split", "resid_scale_override", "opt_resid_scale", "decode_mode", "tlut_bits",
    "skip_list", "V",
    "K", "L", "td_x", "split_for_tp", "K_v_proj", "use_rand", "merge_suv", "per_channel", "rescale_WH", "fused",
    "quant_method",
    "load_in_4bit", "__class__", "to_dict", "validate", "modules_to_not_convert", "_pre_quantization_dtype", "\0",
    "version", "bits",
    "head_bits", "codebook", "model_version", "tensor_storage",
)  # fmt: skip
_LEGAL: dict[str, tuple] = {
    "bits": (1, 2, 2.5, 3, 4, 8),
    "codebook": ("e8p", "e8p-rvq3", "e8p-rvq4", "d4", "half-integer", "scalar2", "scalar8", "E8P12", "D4", "E8P12RVQ3B",
    "bitshift"),
    "incoherence": ("hadamard", "kronecker", "none", "hadamard-128", "stored", ["none", "hadamard"]),
    "residual_scale": (None, 0.3, 1.0, -1.0, 1e-30, 1e30),
    "seed": (0, 1, 2**31),
    "decode_mode": ("1mad", "2mad", "3inst", "lut", "quantlut", "quantlut_sym"),
    "K": (1, 2, 3, 4), "V": (1, 2), "L": (8, 16), "tlut_bits": (0, 9, 16), "td_x": (16, 32), "td_y": (16, 32),
    "split_for_tp": (True, False), "use_rand": (True, False), "per_channel": (True, False), "merge_suv": (True, False),
    "rescale_WH": (True, False), "fused": (True, False), "opt_resid_scale": (-1, 0.1, 3.45), "codesz": (4, 8),
    "lora_rank": (0, 8),
}  # fmt: skip
_NAMES = (
    "", ".", "..", "../model", "model..layers", "model.layers.0.mlp.gate_proj.", ".model", "*", "(a+)+$", "{", "}",
    "model.layers.{0-1}",
    "model.layers.{1-0}.mlp.gate_proj", "model.layers.{0,0}.mlp.gate_proj", "model.layers.{a}.x",
    "model.layers.99.mlp.gate_proj",
    "model.embed_tokens", "lm_head", "model.norm", "model", "model.layers.0", "model.layers.0.mlp.gate_proj.gate_proj",
    "\0", "x" * 10000,
    "{0-99999}.{0-99}", "{0-9999999}", "{0-999}.{0-999}.{0-999}", "{0-99999999999}", "{" + "9" * 5000 + "}",
    "{0-9}." * 12 + "x",
    "{" + "0-9," * 3000 + "0}",
)  # fmt: skip
_PATTERNS = (
    "*", "*" * 200 + "b", "*a" * 60 + "b", "[" * 500, "[!", "[z-a]", "?" * 2000, "model.*", "*.down_proj", "*.q_proj",
    "\0", "[[:alpha:]]", "",
)  # fmt: skip


def _described(folder: Path, rng: random.Random) -> tuple[Path, Any, tuple]:
    """A file, its content, and where in it the quantization is described."""
    config, beside = folder / "config.json", folder / "quantization_config.json"
    content = read(config)
    part = next((part for part in PARTS if part in content), None)
    if beside.is_file() and (part is None or rng.random() < 0.3):
        return beside, read(beside), ()
    return config, content, () if part is None else (part,)


@mutation(7)
def config_value(folder: Path, rng: random.Random) -> str | None:
    """Any value at any place of the description of the quantization."""
    file, content, root = _described(folder, rng)
    path = rng.choice(list(places(at(content, root))) or [()])
    if not path:
        return None
    old, new = at(content, (*root, *path)), rng.choice(HOSTILE)
    at(content, (*root, *path[:-1]))[path[-1]] = new
    dump(file, content)
    return f"{file.name} {path!r:.60}: {shown(old, 30)} becomes {shown(new, 40)}"


@mutation(3)
def config_lost(folder: Path, rng: random.Random) -> str | None:
    """One place less."""
    file, content, root = _described(folder, rng)
    path = rng.choice(list(places(at(content, root))) or [()])
    if not path:
        return None
    del at(content, (*root, *path[:-1]))[path[-1]]
    dump(file, content)
    return f"{file.name} without {path!r:.80}"


@mutation(3)
def config_key(folder: Path, rng: random.Random) -> str | None:
    """One key more, or a key under another spelling."""
    file, content, root = _described(folder, rng)
    options = at(content, root)
    if rng.random() < 0.3:
        old = rng.choice(list(options))
        new = rng.choice([old.upper(), old + " ", old[:-1], f"_{old}", old.replace("_", "-")])
        options[new] = options.pop(old)
        what = f"{old} is spelled {new!r}"
    else:
        key = rng.choice(_KEYS)
        options[key] = rng.choice(HOSTILE)
        what = f"{key!r} is {shown(options[key], 40)}"
    dump(file, content)
    return f"{file.name}: {what}"


@mutation(4)
def config_other(folder: Path, rng: random.Random) -> str | None:
    """Another value that is possible in itself."""
    file, content, root = _described(folder, rng)
    options = at(content, root)
    key = rng.choice([key for key in _LEGAL if key in options] or [""])
    if not key:
        return None
    options[key] = rng.choice(_LEGAL[key])
    dump(file, content)
    return f"{file.name}: {key} is {shown(options[key])}"


@mutation(2)
def config_small(folder: Path, rng: random.Random) -> str | None:
    """One number a little off, or one character of one string changed: what a wrong edit does."""
    file, content, root = _described(folder, rng)
    path = rng.choice(
        [p for p in places(at(content, root)) if isinstance(at(content, (*root, *p)), (int, float, str))] or [()]
    )
    if not path:
        return None
    old = at(content, (*root, *path))
    if isinstance(old, str):
        position = rng.randrange(len(old) + 1)
        new: Any = old[:position] + rng.choice([*string.ascii_letters, *string.digits, ".", ""]) + old[position + 1 :]
    else:
        new = rng.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), [old]])
    at(content, (*root, *path[:-1]))[path[-1]] = new
    dump(file, content)
    return f"{file.name} {path!r:.60}: {shown(old, 30)} becomes {shown(new, 40)}"


@mutation(3)
def config_top(folder: Path, rng: random.Random) -> str:
    """Any value in the part of config.json that is Transformers'."""
    file = folder / "config.json"
    content = read(file)
    extra = ("auto_map", "architectures", "model_type", "dtype", "tie_word_embeddings", "num_hidden_layers", *PARTS)
    key = rng.choice([*content, *extra])
    code = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    content[key] = rng.choice([*HOSTILE, code, ["EvilForCausalLM"]])
    dump(file, content)
    return f"config.json: {key} is {shown(content[key])}"


@mutation(3)
def config_modules(folder: Path, rng: random.Random) -> str | None:
    """Names of quantized modules: lost ones, doubled ones, others, very many."""
    file, content, root = _described(folder, rng)
    options = at(content, root)
    names = list(options.get("quantized_modules") or ())
    if not names:
        return None
    bad, how = rng.choice(_NAMES), rng.randrange(5)
    if how == 0:
        names.append(bad)
    elif how == 1:
        names[rng.randrange(len(names))] = bad
    elif how == 2:
        names.pop(rng.randrange(len(names)))
    elif how == 3:
        names += names
    else:
        names = [f"m{i}.layers.{{0-9}}.x" for i in range(20000)]
    options["quantized_modules"] = names
    dump(file, content)
    return f"quantized_modules changed in way {how} with {shown(bad, 40)}"


@mutation(4)
def config_patterns(folder: Path, rng: random.Random) -> str | None:
    """Options and layouts of modules, by patterns."""
    file, content, root = _described(folder, rng)
    options = at(content, root)
    if "format_version" not in options:
        return None
    pattern = rng.choice(_PATTERNS)
    layout = {
        "padded": rng.choice([[128, 128], [2**40, 2**40], [10**9, 64], [1, 1], [2**63, 2**63], [64], "x", [0, 0]]),
        "row_scales": rng.choice([True, False, 1]),
        "scales_dtype": rng.choice(["float32", "float16", "float64", "int8", None]),
        "fuses": rng.choice([[], ["q_proj"], ["q_proj", "k_proj", "v_proj"], ["../x"], [""], "abc", ["q_proj"] * 50,
        ["__class__"]]),
        "parts": rng.choice([[], [["a", 1]], [["q_proj", 64], ["k_proj", 32]], [["", 1]], [["a.b", 5]], {"a": 1}, [["a",
        2**70]]]),
    }  # fmt: skip
    module = {
        "bits": rng.choice([2, 3, 4, 8]),
        "codebook": rng.choice(["e8p", "d4", "scalar4", "nope", ["e8p"]]),
        "residual_scale": rng.choice([1, 0.5, float("inf"), 0, None]),
        "incoherence": rng.choice(["none", "kronecker", "stored", "bogus", ["none", "hadamard"]]),
        "damping": rng.choice([1, -1, float("nan")]),
    }
    key, source = ("layout", layout) if rng.random() < 0.4 else ("modules", module)
    chosen = {name: source[name] for name in rng.sample(sorted(source), 1 if key == "layout" else rng.randint(1, 2))}
    count = rng.choice([1, 1, 1, 3000])
    there = options.get(key)
    new = {f"{pattern}{i or ''}": chosen for i in range(count)}
    options[key] = {**(there if isinstance(there, dict) else {}), **new}
    dump(file, content)
    return f"{key} {shown(pattern, 20)} {count} times: {shown(chosen, 80)}"


@mutation(3)
def config_text(folder: Path, rng: random.Random) -> str | None:
    """The bytes of a JSON file."""
    files = sorted(path for path in folder.glob("*.json") if path.is_file())
    file = rng.choice([folder / "config.json", *files])
    content = file.read_bytes()
    if not content:
        return None
    position = rng.randrange(len(content))
    after = content[position + 1 :]
    changed = {
        "cut off": content[:position],
        "empty": b"",
        "one byte": content[:position] + bytes([rng.randrange(256)]) + after,
        "one bit": content[:position] + bytes([content[position] ^ (1 << rng.randrange(8))]) + after,
        "one byte less": content[:position] + after,
        "lists": b"[" * 200000,
        "objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "UTF-16": content.decode(errors="replace").encode("utf-16"),
        "BOM": b"\xef\xbb\xbf" + content,
        "a list": b"[" + content + b"]",
        "null": b"null",
        "zeros": bytes(len(content)),
        "digits": content.replace(b"{", b'{"x": ' + b"9" * 5000 + b",", 1),
        "twice": content + content,
        "a key twice": content.replace(b"{", b'{"quantization_config": {}, "weight_map": {}, ', 1),
    }
    how = rng.choice(sorted(changed))
    file.write_bytes(changed[how])
    return f"text of {file.name}: {how} at {position}"


@mutation(2)
def evaluation(folder: Path, rng: random.Random) -> str | None:
    """Measured results that the card shows."""
    file = folder / "quip_evaluation.json"
    if not file.is_file():
        return None
    content = read(file)
    path = rng.choice(list(places(content)))
    at(content, path[:-1])[path[-1]] = rng.choice(HOSTILE)
    dump(file, content)
    return f"quip_evaluation.json {path!r}: {shown(at(content, path))}"


@mutation(2)
def card(folder: Path, rng: random.Random) -> str | None:
    """The model's card that is there already."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    tags = json.dumps(rng.choice(["x", 5, None, [5], {}]))
    fronts = {
        "not closed": "---\nlicense: x\n",
        "not YAML": "---\n{[}: ][\n---\n",
        "a bomb": f"---\n{bomb}---\n",
        "code": "---\nx: !!python/object/apply:os.system ['touch EXECUTED']\n---\n",
        "a list": "---\n- a\n- b\n---\n",
        "a number": "---\n5\n---\n",
        "types": f"---\ntags: {tags}\nbase_model: [1, {{}}]\nmodel-index: 5\n---\n",
        "deep": f"---\nx: {'[' * 3000}{']' * 3000}\n---\n",
        "bytes": "---\nlicense: \udcff\udcfe\n---\n",
        "nothing": "",
        "only lines": "---\n---\n---\n",
        "dates": "---\nx: 2020-99-99\ny: 1:60:60\nz: 0x\n---\n",
    }
    how = rng.choice(sorted(fronts))
    body = rng.choice(["\n# Words\n", "\n"])  # a card without words is replaced, and its metadata is kept
    file.write_text(fronts[how] + body, encoding="utf-8", errors="surrogateescape")
    return f"README.md: {how}"
