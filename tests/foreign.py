"""Checkpoints of other packages, written from their descriptions, beside dense ones of the weights that they mean.

`shared/formats/*.md` are the descriptions. Codes and scales are random; the weights are computed here, densely and in
float64, with nothing of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import truth
from tests.models import tiny_model

# make(name, m, n, generator) → (tensors of the linear by the last part of their names, its weight [m, n])
Make = Callable[[str, int, int, torch.Generator], tuple[dict[str, torch.Tensor], torch.Tensor]]
_DENSE = ("embed", "lm_head", "wte", "wpe", "norm", "gate.weight", "project_")


def write_checkpoints(
    arch: str,
    folder: Path,
    make: Make,
    config: dict,
    rename: dict[str, tuple[str, ...]] | None = None,
    fuse: dict[str, tuple[str, ...]] | None = None,
    finish: Callable[[dict[str, torch.Tensor]], None] | None = None,
    **overrides,
) -> tuple[Path, Path]:
    """Write `folder`/foreign and `folder`/dense, which must compute the same.

    Args:
        arch: of `tests.models`.
        make: makes the tensors of one linear.
        config: what config.json gets besides.
        rename: last part of a linear's name → those of the linears that it is stored as, each with a share of its outputs:
            name:outputs.
        fuse: name of a linear in the checkpoint → those of the model that it computes, in this order.
        finish: changes the foreign tensors at the end.
        overrides: of the model's config.
    """
    tiny_model(arch, **overrides).save_pretrained(folder / "dense")
    file = folder / "dense" / "model.safetensors"
    dense = load_file(file)
    foreign, generator = dict(dense), torch.Generator().manual_seed(7)
    transposed = arch == "gpt2"
    for whole, names in (fuse or {}).items():
        for first in [key for key in dense if key.endswith(f".{names[0]}.weight")]:
            parent = first.removesuffix(f".{names[0]}.weight")
            keys = [f"{parent}.{name}.weight" for name in names]
            rows = [len(foreign.pop(key)) for key in keys]
            tensors, decoded = make(f"{parent}.{whole}", sum(rows), dense[first].shape[1], generator)
            foreign.update({f"{parent}.{whole}.{kind}": value for kind, value in tensors.items()})
            dense.update(zip(keys, (part.float().contiguous() for part in decoded.split(rows)), strict=True))
    for key, weight in list(dense.items()):
        if key not in foreign or not key.endswith(".weight") or weight.ndim != 2 or any(part in key for part in _DENSE):
            continue
        name = key.removesuffix(".weight")
        del foreign[key]
        m, n = reversed(weight.shape) if transposed else weight.shape
        parent, dot, last = name.rpartition(".")
        parts = [part.split(":") for part in (rename or {}).get(last, (f"{last}:{m}",))]
        weights = []
        for part, rows in parts:
            tensors, decoded = make(f"{parent}{dot}{part}", int(rows), n, generator)
            foreign.update({f"{parent}{dot}{part}.{kind}": value for kind, value in tensors.items()})
            weights.append(decoded)
        expected = torch.cat(weights)
        dense[key] = (expected.T if transposed else expected).float().contiguous()
    if finish is not None:
        finish(foreign)
    save_file(dense, file, {"format": "pt"})
    (folder / "foreign").mkdir()
    values = json.loads((folder / "dense" / "config.json").read_text())
    (folder / "foreign" / "config.json").write_text(json.dumps(values | config))
    save_file(
        {key: value.contiguous() for key, value in foreign.items()},
        folder / "foreign" / "model.safetensors",
        {"format": "pt"},
    )
    return folder / "foreign", folder / "dense"


def half(*shape: int, generator: torch.Generator) -> torch.Tensor:
    """Random float16 numbers around ±1."""
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (signs * (1 + torch.rand(shape, generator=generator) / 4)).half()


def quip_for_all(
    use_rand: bool = False,
    per_channel: bool = False,
    missing: tuple[str, ...] = (),
    codebook: str = "E8P12",
    residual: float = 1.0,
) -> Make:
    """Linears of QuIP-for-all; `residual` is what multiplies the second stage."""

    def make(name: str, m: int, n: int, generator: torch.Generator):
        sizes = {"had_left": n, "had_right": m}
        factors, padded, transforms = {}, {}, {}
        for kind, size in sizes.items():
            odd = size // (size & -size)
            padded[kind] = size
            if odd > 1 and use_rand:
                orthogonal = torch.linalg.qr(torch.randn(odd, odd, generator=generator))[0].half().contiguous()
                factors[kind] = orthogonal
                transforms[kind] = torch.kron(orthogonal.double(), truth.hadamard(size // odd))
            elif odd > 3:  # no matrix in tests/truth.py, nor in the package for sizes that 4 does not divide
                assert size % 4
                padded[kind] = 1 << (size - 1).bit_length()
                transforms[kind] = truth.hadamard(padded[kind])
            else:
                transforms[kind] = truth.hadamard(size)
        rows, columns = padded["had_right"], padded["had_left"]
        codes, w = _quip_for_all_codes(codebook, rows, columns, residual, generator)
        scale = (half(rows, generator=generator).abs() if per_channel else torch.tensor(1.25).half()) / n**0.5
        vectors = {"SU": half(n, generator=generator), "SV": half(m, generator=generator)}
        w = w * scale.double().expand(rows)[:, None]
        w = (transforms["had_right"] @ w @ transforms["had_left"].T)[:m, :n]
        for kind in missing:
            vectors[kind] = torch.ones_like(vectors[kind])
        w = vectors["SV"].double()[:, None] * w * vectors["SU"].double()
        kept = {kind: value for kind, value in vectors.items() if kind not in missing}
        dummy = torch.zeros((), dtype=torch.float16)
        return {"Qidxs": codes, **kept, **factors, "Wscale": scale, "weight": dummy}, w

    return make


def _quip_for_all_codes(
    codebook: str, m: int, n: int, residual: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and the weights that they mean (shared/formats/quip_for_all.md, 2)."""
    points = truth.quip_for_all_points().double()
    if codebook == "E8P12":
        codes = torch.randint(-(2**15), 2**15, (m, n // 8), generator=generator)
        return codes.to(torch.int16), points[codes & 0xFFFF].flatten(1)
    if codebook == "E8P12RVQ4B":
        codes = torch.randint(-(2**31), 2**31, (m, n // 8), generator=generator)
        return codes.to(torch.int32), (points[codes >> 16 & 0xFFFF] + residual * points[codes & 0xFFFF]).flatten(1)
    octets = torch.randint(0, 256, (m, n // 8, 3), generator=generator)  # of each group: second stage, low, high
    points = points[octets[..., 1] | octets[..., 2] << 8] + residual * truth.e8_table()[octets[..., 0]]
    return octets.to(torch.uint8).reshape(m, -1).view(torch.int32), points.flatten(1)


def quip_for_all_config(**values) -> dict:
    """The part of config.json that goes with it."""
    base = {"quant_method": "QUiP", "codebook": "E8P12", "codesz": 8, "idx_dtype": "torch.int16", "opt_resid_scale": -1}
    return {"quantization_config": base | values}


def exl3(codes: tuple[str, ...] = ("mcg", "3inst", "mul1"), bits: tuple[float, ...] = (2, 3, 1)) -> Make:
    """Linears of EXL3, with these codes and bits in turn."""
    count = iter(range(10**9))

    def make(name: str, m: int, n: int, generator: torch.Generator):
        index = next(count)
        code, k = codes[index % len(codes)], bits[index % len(bits)]
        rows, columns = -(-m // 128) * 128, -(-n // 128) * 128
        words = (columns // 16, rows // 16, int(16 * k))
        trellis = torch.randint(-(2**15), 2**15, words, generator=generator).to(torch.int16)
        suh, svh = half(columns, generator=generator), (half(rows, generator=generator) / columns**0.5)
        h = truth.hadamard(128)
        w = exl3_inner(trellis, code)
        w = torch.block_diag(*[h] * (columns // 128)) @ w @ torch.block_diag(*[h] * (rows // 128))
        w = (suh.double()[:, None] * w * svh.double())[:n, :m].T
        marker = {} if code == "3inst" else {code: torch.tensor(-877912083 if code == "mcg" else -2082680531).int()}
        return {"trellis": trellis, "suh": suh, "svh": svh, **marker}, w

    return make


def exl3_inner(trellis: torch.Tensor, code: str) -> torch.Tensor:
    """The weight [in, out] before the transforms, float64, bit by bit (shared/formats/exl3.md, 4 to 6)."""
    tiles_in, tiles_out, width = trellis.shape
    words = trellis.reshape(tiles_in * tiles_out, -1, 2).flip(2).reshape(tiles_in * tiles_out, width).long() & 0xFFFF
    bits = (words[:, :, None] >> torch.arange(15, -1, -1)) & 1
    bits = bits.flatten(1)
    i = torch.arange(256)[:, None]
    places = ((i + 1) * width // 16 - 16 + torch.arange(16)) % (16 * width)  # ⌊(i + 1)·K⌋: also for half bits
    states = (bits[:, places] << torch.arange(15, -1, -1)).sum(2)
    values = _exl3_value(states, code)
    q = torch.arange(256)
    lane, r = q >> 3, q & 7
    row, column = 2 * (lane & 3) + (r & 1) + 8 * ((r >> 1) & 1), (lane >> 2) + 8 * (r >> 2)
    tiles = torch.empty(len(values), 16, 16, dtype=torch.float64)
    tiles[:, row, column] = values
    return tiles.view(tiles_in, tiles_out, 16, 16).transpose(1, 2).reshape(tiles_in * 16, tiles_out * 16)


def _exl3_value(s: torch.Tensor, code: str) -> torch.Tensor:
    if code == "mul1":
        x = (s * 0x83DCD12D) & 0xFFFFFFFF
        total = sum((x >> shift) & 255 for shift in (0, 8, 16, 24))
        return ((1024 + total).double() * 0.00676727294921875 - 10.3828125).half().double()
    x = s * 89226354 + 64248484 if code == "3inst" else s * 0xCBAC1FED
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = (((x >> shift) & 0xFFFF).to(torch.int16).view(torch.float16).double() for shift in (0, 16))
    return (low + high).half().double()


def qtip(mode: str, k: int, v: int = 1, q: int = 0, devices: int = 1) -> Make:
    """Linears of QTIP; with several devices, one of the transforms works on parts, and no tensor says so."""

    def make(name: str, m: int, n: int, generator: torch.Generator):
        shape = (m * n // 256, 16 * k)
        trellis = torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16)
        table = torch.randn(1 << q, v, generator=generator).half()
        kernel = mode == "quantlut_sym" and v == 2 and q == 9 and k in (2, 3, 4)
        w = _qtip_inner(trellis, m, n, mode, k * v, table.double(), kernel)
        tensors = {"trellis": trellis, "SU": half(n, generator=generator)}
        tensors["SV"] = half(m, generator=generator).float() / n**0.5
        if mode.startswith(("lut", "quantlut")):
            tensors["tlut"] = table
        inputs = name.rpartition(".")[2] in ("o_proj", "down_proj")
        h_in, h_out = truth.hadamard(n), truth.hadamard(m)
        if devices > 1 and inputs:
            h_in = torch.block_diag(*[truth.hadamard(n // devices)] * devices)
        elif devices > 1:
            h_out = torch.block_diag(*[truth.hadamard(m // devices)] * devices)
        else:
            tensors |= {"rcp": torch.tensor(0), "tp_rank": torch.tensor(8)}
        w = tensors["SV"].double()[:, None] * (h_out @ w @ h_in.T) * tensors["SU"].double()
        return tensors, w

    return make


def qtip_config(mode: str, k: int, v: int = 1, q: int = 0, **values) -> dict:
    """The part of config.json that goes with it."""
    base = {"codebook": "bitshift", "codebook_version": 0, "L": 16, "K": k, "V": v, "tlut_bits": q, "decode_mode": mode}
    return {"quip_params": base | {"td_x": 16, "td_y": 16, "split_for_tp": False} | values}


def _qtip_inner(trellis, m: int, n: int, mode: str, kv: int, table: torch.Tensor, kernel: bool) -> torch.Tensor:
    """The weight before the transforms, float64, bit by bit (shared/formats/qtip.md, 3 and 4)."""
    words = trellis.view(torch.uint16).long()
    if kernel:
        k = trellis.shape[1] // 16
        groups = trellis.view(torch.uint8).view(m // 32, n // 32, 32, 2, 2, k).flip(5)
        pairs = groups.permute(0, 4, 1, 3, 2, 5).reshape(m * n // 256, 16 * k, 2).long()
        words = pairs[..., 0] << 8 | pairs[..., 1]
    bits = ((words[:, :, None] >> torch.arange(15, -1, -1)) & 1).flatten(1)
    step = table.shape[1] if mode.startswith(("lut", "quantlut")) else 1
    places = (torch.arange(256 // step)[:, None] * kv + torch.arange(16)) % bits.shape[1]
    states = (bits[:, places] << torch.arange(15, -1, -1)).sum(2)
    sequence = _qtip_value(states, mode, table).reshape(len(states), 256)
    q = torch.arange(256)
    row, column = q >> 4, q & 15
    if kernel:
        row, column = (q >> 5) + 8 * ((q >> 1) & 1), 2 * ((q >> 3) & 3) + (q & 1) + 8 * ((q >> 2) & 1)
    tiles = torch.empty(len(states), 16, 16, dtype=torch.float64)
    tiles[:, row, column] = sequence
    return tiles.view(m // 16, n // 16, 16, 16).transpose(1, 2).reshape(m, n)


def _qtip_value(s: torch.Tensor, mode: str, table: torch.Tensor) -> torch.Tensor:
    bits = len(table).bit_length() - 1
    if mode == "lut":
        return table[s]
    if mode == "quantlut":
        return table[((s * (s + 1)) >> (16 - bits)) & (len(table) - 1)]
    if mode == "quantlut_sym":
        h = s * (s + 1)
        values = table[(h >> (15 - bits)) & (len(table) - 1)]
        values[..., 0] *= 1 - 2 * ((h >> 15) & 1)
        return values
    if mode == "3inst":
        return _exl3_value(s, "3inst")
    h = (s * 34038481 + 76625530) & 0xFFFFFFFF
    if mode == "2mad":
        h = (s * 264435761 + 1013904223) & 0xFFFFFFFF
        h = (h + (h * 1664525 >> 32)) & 0xFFFFFFFF
    total = sum((h >> shift) & 255 for shift in (0, 8, 16, 24))
    return ((total - 510).float() / 147.800537109375).double()


def quip_sharp(
    codebook: str | dict[str, str] = "E8P12",
    rescale: bool = False,
    wscale: float = 1.0,
    fused: bool = True,
    divisors: tuple[float, float] = (3.45, 2.04),
) -> Make:
    """Linears of QuIP#, fused ones with their scales; with a Wscale as old files have it.

    Args:
        codebook: of all linears, or by the last part of their names.
        divisors: of the second stages of 4 and of 3 bits.
    """

    def make(name: str, m: int, n: int, generator: torch.Generator):
        book = codebook if isinstance(codebook, str) else codebook[name.rpartition(".")[2]]
        words, decoded = _quip_sharp_codes(book, m, n, generator, divisors)
        parts = {"qkv_proj": (64, 32, 32), "upgate_proj": (m // 2, m // 2)}.get(name.rpartition(".")[2])
        tensors = {"Qidxs": words, "SU": half(n, generator=generator), "SV": half(m, generator=generator) / n**0.5}
        identity = {"E8P12": 7, "E8P12RVQ4B": 17, "E8P12RVQ3B": 18, "D4": 0, "HI4B1C": 10}[book]
        tensors |= {"Wscale": torch.tensor(wscale).half(), "codebook_id": torch.tensor(identity)}
        w = truth.hadamard(m) @ decoded @ truth.hadamard(n).T
        w = (tensors["SV"].double() * tensors["Wscale"].double())[:, None] * w * tensors["SU"].double()
        if rescale:
            tensors["scaleWH"] = half(n, generator=generator).abs()
            w = w / tensors["scaleWH"].double()
        if fused and parts is not None:
            tensors["fuse_scales"] = half(len(parts), generator=generator)
            w = w * tensors["fuse_scales"].double().repeat_interleave(torch.tensor(parts))[:, None]
        return tensors, w

    return make


def _quip_sharp_codes(
    codebook: str, m: int, n: int, generator: torch.Generator, divisors: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes as the package packs them, and the weights that they mean (shared/formats/quip_sharp.md, 1.3 and 3)."""
    if codebook in ("E8P12RVQ4B", "E8P12RVQ3B"):
        words, decoded = _quip_sharp_codes("E8P12", m, n, generator, divisors)
        if codebook == "E8P12RVQ4B":
            second, residual = _quip_sharp_codes("E8P12", m, n, generator, divisors)
            return torch.cat([words, second], 1), decoded + residual / divisors[0]
        second = torch.randint(0, 256, (m, n // 8), generator=generator)
        packed = torch.cat([words, second.to(torch.uint8).view(torch.int64)], 1)
        return packed, decoded + truth.e8_table()[second].flatten(1) / divisors[1]
    if codebook == "E8P12":
        codes = torch.randint(-(2**15), 2**15, (m, n // 8), generator=generator).to(torch.int16)
        return pack_tiles(codes), truth.decode(codes, n)
    if codebook == "D4":
        codes = torch.randint(0, 256, (m, n // 4), generator=generator).to(torch.uint8)
        packed = codes.view(m, n // 16, 4).permute(1, 0, 2).reshape(m, n // 4)
        return packed, truth.d4_table()[codes.long()].flatten(1)
    values = torch.randint(0, 16, (m, n // 8, 8), generator=generator)
    word = torch.zeros(m, n // 8, dtype=torch.int64)
    for nibble, element in zip((7, 6, 5, 4, 3, 2, 1, 0), (0, 2, 4, 6, 1, 3, 5, 7), strict=True):
        word |= values[..., element] << (4 * nibble)
    return word.to(torch.int32), values.flatten(1).double() - 7.5


def pack_tiles(codes: torch.Tensor) -> torch.Tensor:
    """QuIP#'s order for tensor cores of codes [m, n/8], cell by cell (shared/formats/quip_sharp.md, 3.3)."""
    m, n = codes.shape[0], codes.shape[1] * 8
    words = torch.zeros(m // 16, n // 64, 8, 4, dtype=torch.int64)
    c = (codes.long() & 0xFFFF).tolist()
    for row in range(0, m, 2):
        for group in range(n // 16):
            cell = (c[row][2 * group], c[row + 1][2 * group], c[row][2 * group + 1], c[row + 1][2 * group + 1])
            word = 0
            for i, code in enumerate(cell):
                word |= (code >> 8) << (8 * i)
                for j in range(8):
                    word |= (code >> j & 1) << (32 + 4 * j + i)
            pair = row // 2
            words[pair // 8, group // 4, pair % 8, group % 4] = word - (1 << 64 if word >> 63 else 0)
    return words.reshape(m, n // 32)
