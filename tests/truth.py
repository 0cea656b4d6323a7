"""What a quantized linear must compute, written down from the formats' description and not from the package.

`shared/formats/quip_sharp.md` gives the tables of E8P and E8 (3.1, 3.2) and the Hadamard matrices (4),
`shared/formats/quip_for_all.md` that of D4 (2); everything here is float64 and dense.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import struct
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)


@functools.cache
def e8p_table() -> torch.Tensor:
    """Point of every code, float64 [65536, 8]."""
    rows = [v for v in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in v) <= 10]
    rows += [[0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in _HALVES.split()]
    table = torch.empty(65536, 8, dtype=torch.float64)
    for pattern, row in enumerate(rows):
        base = list(row)
        if sum(row) % 2 == 1:
            base[7] = -base[7]
        for low in range(256):
            parity = low.bit_count() & 1
            flips = low ^ parity
            signs = [-1 if flips >> bit & 1 else 1 for bit in (0, 4, 1, 5, 2, 6, 3, 7)]
            shift = -0.25 if parity else 0.25
            table[pattern << 8 | low] = torch.tensor([s * b + shift for s, b in zip(signs, base, strict=True)])
    digest = hashlib.sha256(table.float().numpy().tobytes()).hexdigest()
    assert digest == "69038254fded6881558c6369a333e7e5a9160a1425321c215a1cef0278cbea7a"
    return table


@functools.cache
def quip_for_all_points() -> torch.Tensor:
    """QuIP-for-all's E8P points by code, from `shared/formats/quip_for_all.md` (2): float32 [65536, 8]."""
    # of a code without signs, the point is its pattern with an even sum, plus 1/4
    base = e8p_table()[torch.arange(256) << 8].float() - 0.25
    table = torch.empty(65536, 8)
    for byte in range(256):
        parity = byte.bit_count() & 1
        flips = byte ^ parity
        signs = torch.tensor([-1.0 if flips >> bit & 1 else 1.0 for bit in (7, 5, 6, 4, 3, 1, 2, 0)])
        table[(torch.arange(256) << 8) + byte] = base * signs + (-0.25 if parity else 0.25)
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    assert digest == "742f25a2b6d28a72a6c558750044cbe55f20b1e25c42b3db315eecfc64ed98a0"
    return table


@functools.cache
def e8_table() -> torch.Tensor:
    """Point of every byte of the one-byte E8 codebook, float64 [256, 8]."""
    whole = [v for v in itertools.product(range(-1, 2), repeat=8) if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    axes = [[2 * sign * (i == j) for j in range(8)] for sign in (1, -1) for i in range(8)]
    table = torch.tensor([*map(list, whole), *map(list, halves), *axes[:15]], dtype=torch.float64)
    digest = hashlib.sha256(table.float().numpy().tobytes()).hexdigest()
    assert digest == "316d863757a0fe95c5e7c0c8bb1449460a952e1ae7ae7d6c0d9bf9809856a75f"
    return table


@functools.cache
def d4_table() -> torch.Tensor:
    """Point of every byte of the D4 codebook, float64 [256, 4]."""
    rows = []
    for code in range(256):
        z = code & 31
        if z < 2:
            row = [0.5 + z] * 4
        elif z < 8:
            inside, outside = (1.5, 0.5) if z & 1 else (0.5, 1.5)
            row = [inside if i in (0, z >> 1) else outside for i in range(4)]
        elif z < 20:
            inside, outside = {2: (1.5, 0.5), 3: (0.5, 1.5), 4: (2.5, 0.5)}[z >> 2]
            row = [inside if i == z & 3 else outside for i in range(4)]
        else:
            a, b = (z - 20) & 3, (z - 20) >> 2
            b += b >= a
            row = [{a: 1.5, b: 2.5}.get(i, 0.5) for i in range(4)]
        row[2] *= -1 if code & 32 else 1
        row[1] *= -1 if code & 64 else 1
        row[3] *= -1 if sum(row) % 2 else 1
        rows.append([-x if code & 128 else x for x in row])
    table = torch.tensor(rows, dtype=torch.float64)
    digest = hashlib.sha256(table.float().numpy().tobytes()).hexdigest()
    assert digest == "70ed5fe4acd27075afe98b5d943ed9abac2a0abe75793b7565b5c449b66e6eca"
    return table


_MASK = 0xFFFFFFFF


def _half(bits):
    return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]


def _to_half(number):
    return struct.unpack("<e", struct.pack("<e", number))[0]


def _byte_sum(h):
    return sum(h >> shift & 255 for shift in (0, 8, 16, 24))


def trellis_value(code, state, table):
    """The V weights of a state, by the descriptions in shared/formats, in Python's own arithmetic."""
    if code in ("hyb", "quantlut", "lut"):
        bits = table.shape[0].bit_length() - 1
        h = state * (state + 1)
        index = (state if code == "lut" else h >> (15 if code == "hyb" else 16) - bits) & table.shape[0] - 1
        found = [float(v) for v in table[index]]
        return [-found[0], *found[1:]] if code == "hyb" and h >> 15 & 1 else found
    if code in ("1mad", "2mad"):
        h = (state * 34038481 + 76625530) & _MASK
        if code == "2mad":
            h = (state * 264435761 + 1013904223) & _MASK
            h = (h + (h * 1664525 >> 32)) & _MASK
        scale = struct.unpack("<f", struct.pack("<f", 147.800537109375))[0]
        return [struct.unpack("<f", struct.pack("<f", (_byte_sum(h) - 510) / scale))[0]]
    if code == "mul1":
        return [_to_half((1024 + _byte_sum(state * 0x83DCD12D & _MASK)) * _half(0x1EEE) + _half(0xC931))]
    h = (state * 89226354 + 64248484 if code == "3inst" else state * 0xCBAC1FED) & _MASK
    h = (h & 0x8FFF8FFF) ^ 0x3B603B60
    return [_to_half(_half(h >> 16) + _half(h))]


def trellis_place(order, q):
    """Row and column in its tile of weight q of a tile's sequence."""
    if order == "rows":
        return q >> 4, q & 15
    if order == "qtip":
        return (q >> 5) + 8 * (q >> 1 & 1), 2 * (q >> 3 & 3) + (q & 1) + 8 * (q >> 2 & 1)
    lane, i = q >> 3, q & 7
    return (lane >> 2) + 8 * (i >> 2), 2 * (lane & 3) + (i & 1) + 8 * (i >> 1 & 1)


def trellis_weight(name: str, codes: torch.Tensor, columns: int, table: torch.Tensor | None = None) -> torch.Tensor:
    """Ŵ float64 [m, columns] of the stored codes of a trellis codebook, int16 [m, columns / 16 · K]."""
    code, k, order = re.fullmatch(r"trellis:([a-z0-9]+)(?:-q.*)?:k([\d.]+):([a-z0-9]+)", name).groups()
    k, step, m = Fraction(k), 1 if table is None else table.shape[1], len(codes)
    weight = torch.empty(m, columns, dtype=torch.float64)
    for tile, words in enumerate((codes.long() & 0xFFFF).reshape(-1, int(16 * k)).tolist()):
        down, right = divmod(tile, columns // 16)
        bits = "".join(f"{word:016b}" for word in words)
        for t in range(256 // step):
            state = int("".join(bits[(math.ceil(t * k * step) + j) % len(bits)] for j in range(16)), 2)
            for i, weights in enumerate(trellis_value(code, state, table)):
                row, column = trellis_place(order, t * step + i)
                weight[16 * down + row, 16 * right + column] = weights
    return weight


# The tensors that a codebook may store for a weight, in their order.
STORED = ("codes", "codes_residual", "table")


def stored(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the tensors of a layer, those that stand for its weight: by name, in the codebook's order."""
    return {name: parts[name] for name in STORED if name in parts}


def weight(parts: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The same as the ops take them."""
    return list(stored(parts).values())


SCALAR_BITS = {"scalar2": 2, "scalar3": 3, "scalar4": 4, "scalar8": 8, "half-integer": 4}
RESIDUAL_SCALES = {"e8p-rvq3": 1 / 2.04, "e8p-rvq4": 1 / 3.8}  # of the native format
CODEBOOKS = ("e8p", "e8p-rvq3", "e8p-rvq4", "d4", *SCALAR_BITS)


def decode(
    codes: torch.Tensor,
    columns: int,
    codebook: str = "e8p",
    codes_residual: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ŵ float64 [m, columns] of stored codes; of a codebook like "e8p-rvq4@0.25", the number is the residual scale."""
    codebook, _, residual_scale = codebook.partition("@")
    if codebook.startswith("trellis:"):
        return trellis_weight(codebook, codes, columns, table)
    if codebook in SCALAR_BITS:
        bits = SCALAR_BITS[codebook]
        rows = [int.from_bytes(bytes(row), "little") for row in codes.tolist()]
        values = [[(row >> bits * i) % 2**bits - (2**bits - 1) / 2 for i in range(columns)] for row in rows]
        return torch.tensor(values, dtype=torch.float64)
    if codebook == "d4":
        return d4_table()[codes.long()].flatten(1)[:, :columns]
    weight = e8p_table()[codes.long() & 0xFFFF]
    if codebook == "e8p-rvq3":
        weight = weight + float(residual_scale or RESIDUAL_SCALES[codebook]) * e8_table()[codes_residual.long()]
    elif codebook == "e8p-rvq4":
        weight = weight + float(residual_scale or RESIDUAL_SCALES[codebook]) * e8p_table()[codes_residual.long() & 0xFFFF]
    return weight.flatten(1)[:, :columns]


def decode_residual(codes: torch.Tensor, columns: int) -> torch.Tensor:
    """The second stage float64 [m, columns], of int16 (E8P) or uint8 (E8) codes [m, c]."""
    if codes.dtype == torch.int16:
        return decode(codes, columns)
    return e8_table()[codes.long()].flatten(1)[:, :columns]


def random_residual(m: int, n: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Random codes of a second stage of a [m, n] linear, int16 or uint8."""
    limits = torch.iinfo(dtype)
    shape, generator = (m, -(-n // 8)), torch.Generator().manual_seed(seed)
    return torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)


@functools.cache
def random_orthogonal(order: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix, float64."""
    matrix = torch.randn(order, order, generator=torch.Generator().manual_seed(order + seed), dtype=torch.float64)
    return torch.linalg.qr(matrix)[0].contiguous()


def sylvester(order: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix of a power of two over its root, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / order**0.5


def kron(factors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The Kronecker product of float64 matrices."""
    return functools.reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64))


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """‖given - expected‖ / ‖expected‖."""
    return ((given.double() - expected).norm() / expected.norm()).item()


def hadamard(size: int) -> torch.Tensor:
    """The orthogonal Q of order 2^p (Sylvester), or 12·2^p or 20·2^p (Paley I for q = 11, 19, times Sylvester), float64."""
    core = torch.ones(1, 1, dtype=torch.float64)
    if size % 3 == 0 or size % 5 == 0:
        q = 11 if size % 3 == 0 else 19
        squares = {i * i % q for i in range(1, q)}
        core = torch.ones(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:] = -1
        for i, j in itertools.product(range(q), repeat=2):
            core[1 + i, 1 + j] = 1 if i == j or (i - j) % q in squares else -1
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while core.shape[0] * sylvester.shape[0] < size:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    q = torch.kron(core, sylvester)
    assert q.shape == (size, size)
    return q / size**0.5


def dense_weight(
    codes: torch.Tensor, su: torch.Tensor, sv: torch.Tensor, incoherence: str = "hadamard", **codebook
) -> torch.Tensor:
    """diag(sv) Q_out Ŵ Q_inᵀ diag(su), float64 [m, n]; `codebook`: further arguments of `decode`.

    `incoherence`: "hadamard", or "input side": the Hadamard transform there and none on the output side; or "none".
    """
    m, n = len(sv), len(su)
    weight = decode(codes, n, **codebook)
    if incoherence == "hadamard":
        weight = hadamard(m) @ weight
    if incoherence != "none":
        weight = weight @ hadamard(n).T
    return sv.double()[:, None] * weight * su.double()


def weight_between(
    parts: Mapping[str, torch.Tensor], codebook: str, q_in: torch.Tensor, q_out: torch.Tensor
) -> torch.Tensor:
    """diag(sv) Q_out Ŵ Q_inᵀ diag(su), float64 [m, n], of a linear's tensors and the matrices of its transforms."""
    tensors = dict(stored(parts))
    decoded = decode(tensors.pop("codes"), len(parts["su"]), codebook, **tensors)
    return parts["sv"].double()[:, None] * (q_out @ decoded @ q_in.T) * parts["su"].double()


def random_linear(
    m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32, codebook: str = "e8p"
) -> dict[str, torch.Tensor]:
    """Random codes (also of a second stage, where the codebook has one), su, sv and bias of a [m, n] linear."""
    generator = torch.Generator().manual_seed(seed)

    def words() -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, (m, -(-n // 8)), generator=generator).to(torch.int16)

    def octets(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (m, count), generator=generator).to(torch.uint8)

    codebook = codebook.partition("@")[0]
    if codebook in SCALAR_BITS:
        codes = {"codes": octets(-(-n * SCALAR_BITS[codebook] // 8))}
    elif codebook == "d4":
        codes = {"codes": octets(-(-n // 4))}
    elif codebook.startswith("trellis:"):
        q, v, k = re.fullmatch(r"trellis:[a-z0-9]+(?:-q(\d+)v(\d))?:k([\d.]+):[a-z0-9]+", codebook).groups()
        words_of_a_row = (m, int(n // 16 * float(k)))
        codes = {"codes": torch.randint(-(2**15), 2**15, words_of_a_row, generator=generator).to(torch.int16)}
        if q:
            codes["table"] = torch.randn(2 ** int(q), int(v), generator=generator).to(dtype)
    else:
        codes = {"codes": words()}
    if codebook == "e8p-rvq3":
        codes["codes_residual"] = octets(-(-n // 8))
    elif codebook == "e8p-rvq4":
        codes["codes_residual"] = words()
    return {
        **codes,
        "su": torch.randn(n, generator=generator).to(dtype),
        "sv": torch.randn(m, generator=generator).to(dtype),
        "bias": torch.randn(m, generator=generator).to(dtype),
    }
