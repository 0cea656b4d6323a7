"""What each family says of a linear from its headers alone: fields of configs that golden files do not show."""

from __future__ import annotations

import pytest
import torch

from transformers_quip.checkpoints.foreign.family import Source
from transformers_quip.checkpoints.foreign.native_config import by_pattern
from transformers_quip.checkpoints.foreign.plan import family_of
from transformers_quip.checkpoints.headers import TensorInfo


def source(name: str = "model.layers.0.mlp.down_proj", values: dict | None = None, **tensors: tuple) -> Source:
    infos = {kind: TensorInfo(shape, dtype, "file", kind) for kind, (dtype, *shape) in tensors.items()}
    infos = {kind: TensorInfo(tuple(info.shape), info.dtype, "file", kind) for kind, info in infos.items()}
    return Source(name, infos, {kind: f"{name}.{kind}" for kind in infos}, lambda kind: torch.tensor((values or {})[kind]))


def quip_for_all(codes: tuple, m: int, n: int, **parameters):
    config = {"quant_method": "QUiP", "codebook": "E8P12", "use_rand": False, **parameters}
    vectors = {"SU": ("F16", n), "SV": ("F16", m), "Wscale": ("F16",)}
    return family_of(config).describe(source(Qidxs=codes, **vectors), m, n, config)


@pytest.mark.parametrize(("value", "expected"), [(-1, -1.0), (0.29, 0.29), (None, 1 / 3.45)])
def test_residual_scale_of_quip_for_all_is_literal(value, expected):
    form = quip_for_all(("I32", 64, 8), 64, 64, codebook="E8P12RVQ4B", opt_resid_scale=value)
    assert (form.codebook, form.residual_scale) == ("e8p-rvq4", expected)


@pytest.mark.parametrize(("value", "expected"), [(-1, 1 / 3.45), (0, 1 / 3.45), (4.0, 0.25)])
def test_residual_scale_of_quip_sharp_divides(value, expected):
    config = {"codebook": "E8P12RVQ4B", "codebook_version": 1, "resid_scale_override": value}
    vectors = {"SU": ("F16", 64), "SV": ("F16", 64), "Wscale": ("F16",)}
    tensors = source(Qidxs=("I64", 64, 4), **vectors, codebook_id=("I64",), values={"codebook_id": 17})
    assert family_of(config).describe(tensors, 64, 64, config).residual_scale == expected


@pytest.mark.parametrize(
    ("size", "name", "padded"),
    [
        (128, "hadamard", 128),
        (192, "hadamard", 192),
        (31 * 8, "hadamard-quip-for-all", 31 * 8),
        (53 * 8, "hadamard-quip-for-all", 53 * 8),
        (67 * 8, "hadamard", 1024),
        (268, "hadamard", 512),
        (6, "hadamard", 8),
    ],
)
def test_transforms_of_quip_for_all(size, name, padded):
    form = quip_for_all(("I16", 64, padded // 8), 64, size)
    assert form.incoherence == (name, "hadamard")
    assert form.padded == (64, padded)


def test_the_factor_is_random_where_nothing_is_said():
    config = {"quant_method": "QUiP", "codebook": "E8P12"}
    tensors = source(Qidxs=("I16", 64, 24), SU=("F16", 192), SV=("F16", 64), Wscale=("F16",))
    with pytest.raises(ValueError, match="had_left is missing"):
        family_of(config).describe(tensors, 64, 192, config)


QTIP = {"codebook": "bitshift", "codebook_version": 0, "L": 16, "K": 2, "V": 2, "tlut_bits": 9, "td_x": 16, "td_y": 16}


@pytest.mark.parametrize(
    ("mode", "v", "bits", "k", "expected"),
    [
        ("quantlut_sym", 2, 9, 2, "trellis:hyb-q9v2:k2:qtip"),
        ("quantlut_sym", 2, 9, 1, "trellis:hyb-q9v2:k1:rows"),
        ("quantlut_sym", 1, 9, 2, "trellis:hyb-q9v1:k2:rows"),
        ("quantlut", 2, 9, 2, "trellis:quantlut-q9v2:k2:rows"),
        ("lut", 1, 16, 3, "trellis:lut-q16v1:k3:rows"),
        ("1mad", 1, 0, 4, "trellis:1mad:k4:rows"),
        ("2mad", 1, 0, 2, "trellis:2mad:k2:rows"),
        ("3inst", 1, 0, 2, "trellis:3inst:k2:rows"),
    ],
)
def test_trellises_of_qtip(mode, v, bits, k, expected):
    config = QTIP | {"decode_mode": mode, "K": k, "V": v, "tlut_bits": bits}
    tensors = {"trellis": ("I16", 128 * 64 // 256, 16 * k), "SU": ("F16", 64), "SV": ("F32", 128)}
    if bits:
        tensors["tlut"] = ("F16", 1 << bits, v)
    assert family_of(config).describe(source(**tensors), 128, 64, config).codebook == expected


@pytest.mark.parametrize(
    ("name", "split_for_tp", "rcp", "expected"),
    [
        ("down_proj", False, None, ("hadamard", "hadamard")),
        ("down_proj", True, None, ("hadamard-eighths", "hadamard")),
        ("up_proj", True, None, ("hadamard", "hadamard-eighths")),
        ("up_proj", True, 0, ("hadamard", "hadamard")),
        ("up_proj", False, 1, ("hadamard-eighths", "hadamard")),
    ],
)
def test_splits_of_qtip(name, split_for_tp, rcp, expected):
    config = QTIP | {"decode_mode": "1mad", "V": 1, "tlut_bits": 0, "split_for_tp": split_for_tp}
    tensors = {"trellis": ("I16", 128 * 64 // 256, 32), "SU": ("F16", 64), "SV": ("F32", 128)}
    values = {} if rcp is None else {"rcp": rcp, "tp_rank": 8}
    tensors |= dict.fromkeys(values, ("I64",))
    form = family_of(config).describe(source(f"model.layers.0.mlp.{name}", values, **tensors), 128, 64, config)
    assert form.incoherence == expected


def test_other_numbers_of_devices_are_refused():
    config = QTIP | {"decode_mode": "1mad", "V": 1, "tlut_bits": 0}
    tensors = {"trellis": ("I16", 32, 32), "SU": ("F16", 64), "SV": ("F32", 128), "rcp": ("I64",), "tp_rank": ("I64",)}
    with pytest.raises(ValueError, match="tp_rank is 4; only models made for 8 devices"):
        family_of(config).describe(source(values={"rcp": 1, "tp_rank": 4}, **tensors), 128, 64, config)


@pytest.mark.parametrize(
    ("kinds", "code"), [((), "3inst"), (("mcg",), "mcg"), (("mul1",), "mul1"), (("mcg", "mul1"), "mcg")]
)
@pytest.mark.parametrize("k", range(1, 9))
def test_trellises_of_exl3(kinds, code, k):
    tensors = {"trellis": ("I16", 2 * 8, 8, 16 * k), "suh": ("F16", 256), "sv": ("I16", 8)}
    tensors |= dict.fromkeys(kinds, ("I32",))
    form = family_of({"quant_method": "exl3"}).describe(source(**tensors), 100, 192, {})
    assert form.codebook == f"trellis:{code}:k{k}:exl3"
    assert form.padded == (128, 256)


def test_signs_of_old_exl3_files():
    words = torch.tensor([0b0000000000000101, -(2**15)], dtype=torch.int16)
    form = family_of({"quant_method": "exl3"}).describe(
        source(trellis=("I16", 8, 8, 32), su=("I16", 8), svh=("F16", 128)), 128, 128, {}
    )
    tensors = {"trellis": torch.zeros(8, 8, 32).short(), "su": words.repeat(4), "svh": torch.ones(128).half()}
    su = family_of({"quant_method": "exl3"}).repack(tensors, form)["su"]
    expected = torch.ones(32)
    expected[[0, 2, 31]] = -1
    assert torch.equal(su, expected.repeat(4))


def test_patterns_mean_what_they_stand_for():
    from transformers_quip.config.patterns import matches

    values = {f"layers.{i}.mlp.{name}": {"a": 1} for i in range(3) for name in ("up", "down")}
    values["layers.1.mlp.up"] = {"a": 2}
    values |= {f"layers.{i}.mlp.experts.{e}.w": {"b": e} for i in range(3) for e in range(2)}
    values |= {f"layers.{i}.x.0.mlp.down": {"a": 3} for i in range(3)} | {"head": {}}
    patterns = by_pattern(values)
    for name, options in values.items():
        merged = {}
        for pattern in sorted(patterns):  # whatever the order
            if matches(name, pattern):
                merged |= patterns[pattern]
        assert merged == options
    assert "layers.*.x.*.mlp.down" in patterns
