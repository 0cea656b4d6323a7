"""Trellis-coded weights, the codebooks of QTIP (arXiv 2406.11235) and of EXL3.

A tile of 16×16 weights is 256·K bits, read as a ring. A weight (or a pair of neighbours, V = 2) is a function of 16 bits
of it, the *state*; the next state begins K·V bits further on, so that neighbours share bits and every state is one of few
that may follow the one before ("bitshift trellis").

**Codes** of a weight Ŵ [m, n], m and n multiples of 16: int16 [m, n/16·K], and in memory [m/16, n/16, 16·K]: the tiles
in row-major order, 16·K words each. A tile's bits run through its words in order, each word from its highest bit down:

    bit b of a tile        (word[b // 16] >> (15 − b % 16)) & 1
    state t of a tile      bits (⌈t·K·V⌉ + j) mod 256·K for j = 0 … 15, the first being the highest;  t = 0 … 256/V − 1
    weights V·t … V·t+V−1 of the tile's sequence = value(state t)

K is 1 to 8; for code mul1 in order exl3 also 1.5, 2.5 and 3.5. The steps from one state to the next are then ⌈K⌉ and ⌊K⌋
bits in turn, and n must be a multiple of 32.

**Order**: where weight q = (q₇…q₀)₂ of a tile's sequence lies in the tile. A stream cannot be rearranged afterwards, and
each family of checkpoints has its own order, so the order is part of the name:

    rows    row = q₇q₆q₅q₄     column = q₃q₂q₁q₀       QTIP, general
    qtip    row = q₁q₇q₆q₅     column = q₂q₄q₃q₀       QTIP, where its kernels decode (HYB of 2, 3 and 4 bits)
    exl3    row = q₂q₇q₆q₅     column = q₁q₄q₃q₀       EXL3 (row: output, column: input)

**Names**: `trellis:CODE:kK:ORDER`, such as "trellis:mul1:k2.5:exl3"; for codes with a table also its size, Q = log₂ of its
rows and V: "trellis:hyb-q9v2:k2:qtip".

**Values** of a state s (32-bit arithmetic without sign; Σ is the sum of the four bytes of h):

    1mad      h = 34038481 s + 76625530                                          (Σ − 510) / 147.800537109375 in float32
    2mad      g = 264435761 s + 1013904223,  h = g + (1664525 g >> 32)           the same
    3inst     h = (89226354 s + 64248484) & 0x8FFF8FFF ^ 0x3B603B60              sum of both halves as float16, in float16
    mcg       h = 0xCBAC1FED s & 0x8FFF8FFF ^ 0x3B603B60                         the same
    mul1      h = 0x83DCD12D s                                  (1024 + Σ)·0.00676727294921875 − 10.3828125, once to float16
    hyb       h = s(s + 1)      table[bits 15−Q … 14 of h], the first of the pair negative if bit 15 of h is set
    quantlut  h = s(s + 1)      table[bits 16−Q … 15 of h]
    lut                         table[s], Q = 16
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import torch

from . import viterbi
from .base import Codebook, Grid, table
from .trellis_tables import default_table

TILE = 16
STATE_BITS = 16
STATES = 1 << STATE_BITS
# Weights decoded at a time, so that intermediate results stay in a CPU's cache.
DECODED_AT_ONCE = 1 << 18

# Bits per weight: for every code, and those for one code in one order.
WHOLE_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
HALF_BITS = {("mul1", "exl3"): (1.5, 2.5, 3.5)}
COMPUTED = ("1mad", "2mad", "3inst", "mcg", "mul1")
TABULATED = ("hyb", "quantlut", "lut")
# For each order: the sizes into which the 256 weights of a tile's sequence are cut, and which of those dimensions make up
# the row and the column (the slowest first).
ORDERS = {
    "rows": ((16, 16), (0,), (1,)),
    "qtip": ((8, 4, 2, 2, 2), (3, 0), (2, 1, 4)),
    "exl3": ((8, 4, 2, 2, 2), (2, 0), (3, 1, 4)),
}
# Rms of Gaussian weights with the least error, relative to the rms of the values: measured, by bits.
_GAUSSIAN_SCALES = {1: 1.15, 1.5: 1.05, 2: 1.0, 2.5: 0.95, 3: 0.95, 3.5: 0.9, 4: 0.9, 5: 0.88, 6: 0.83, 7: 0.8, 8: 0.77}
# The code that is called "trellis", by bits: one that EXL3 files can have, too, and whose error of a Gaussian is within 1 %
# of the least of all codes without a table.
BEST = {
    1: "trellis:mcg:k1:exl3",
    **{bits: f"trellis:mul1:k{bits:g}:exl3" for bits in (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)},
}
_NAME = re.compile(r"trellis:([a-z0-9]+)(?:-q([1-9][0-9]*)v([12]))?:k([1-9](?:\.5)?):([a-z0-9]+)")
_USAGE = (
    f"a trellis codebook is called trellis:CODE:kK:ORDER with CODE one of {', '.join(COMPUTED)}, or of "
    f"{', '.join(TABULATED)} followed by the size of the table as in hyb-q9v2; K = 1 to 8 bits, and 1.5, 2.5 or 3.5 "
    f"for mul1 in order exl3; ORDER one of {', '.join(ORDERS)}"
)


class Trellis(Codebook):
    """One code, K bits per weight and one order in a tile; see the file's description.

    Args:
        code: one of `COMPUTED` or `TABULATED`.
        k: bits per weight, 1 to 8; see `HALF_BITS`.
        order: one of `ORDERS`.
        table_shape: (2^Q, V) for a code with a table, V = 1 or 2; else None.

    Raises:
        ValueError: the trellis is not a known one.
    """

    block_size = rows_together = TILE
    code_dtype = torch.int16
    kernels = "trellis"
    # A sweep costs as much time as the first rounding.
    refinement_sweeps = 0

    def __init__(self, code: str, k: float, order: str, table_shape: tuple[int, int] | None = None):
        self.code, self.k, self.order, self.table_shape = code, k, order, table_shape
        size = "" if table_shape is None else f"-q{table_shape[0].bit_length() - 1}v{table_shape[1]}"
        self.name = f"trellis:{code}{size}:k{k:g}:{order}"
        known = WHOLE_BITS + HALF_BITS.get((code, order), ())
        if code not in COMPUTED + TABULATED or order not in ORDERS or k not in known:
            raise ValueError(f"{self.name!r} is not a codebook: {_USAGE}")
        if (table_shape is not None) != (code in TABULATED):
            has = "a" if code in TABULATED else "no"
            raise ValueError(f"{self.name!r} is not a codebook, {code} has {has} table: {_USAGE}")
        if table_shape is not None:
            rows, self.step = table_shape
            fewest, most = {"hyb": (1, 15), "quantlut": (1, 16), "lut": (16, 16)}[code]
            if rows not in [1 << q for q in range(fewest, most + 1)] or self.step not in (1, 2):
                raise ValueError(
                    f"{self.name!r} is not a codebook: the table of {code} has 2^Q rows, Q from {fewest} to {most}, and 1 "
                    f"or 2 columns, got {list(table_shape)}"
                )
        else:
            self.step = 1
        self.bits = float(k)
        # Feedback adds errors to the weights. At 2 bits 0.9 and 0.95 differ by less than 1 % (three linears of SmolLM2);
        # with every bit the energy of the errors falls fourfold.
        self.scale_factors = (1 - 0.07 * 4.0 ** (2 - max(k, 2)),)

    @functools.cached_property
    def gaussian_scale(self) -> float:  # type: ignore[override]
        """See [`Codebook`]: measured for every number of bits, as a multiple of the rms of all values."""
        values, _ = _encoder_on(self.name, torch.device("cpu"))
        # few pairs of values leave gaps at the ends, which hurt from 4 bits on
        factor = min(_GAUSSIAN_SCALES[self.k], 0.8) if self.step == 2 and self.k >= 4 else _GAUSSIAN_SCALES[self.k]
        return values.square().mean().sqrt().item() * factor

    @classmethod
    def parse(cls, name: str) -> Trellis:
        """The codebook of this name. Raises `ValueError` if there is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a codebook: {_USAGE}")
        code, q, v, k, order = match.groups()
        return cls(code, float(k) if "." in k else int(k), order, None if q is None else (1 << min(int(q), 17), int(v)))

    @property
    def columns_together(self) -> int:
        """See [`Codebook.columns_together`]: a row of codes has whole words."""
        return TILE if self.k in WHOLE_BITS else 2 * TILE

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int, int]:
        """See [`Codebook.codes_shape`]: rows of tiles, tiles, words. Raises `ValueError` for incomplete tiles."""
        wide = self.columns_together
        if out_features % TILE or in_features % wide:
            raise ValueError(
                f"codebook {self.name!r} has tiles of {TILE}x{TILE} weights: sizes must be multiples of {TILE} and {wide}, "
                f"got [{out_features}, {in_features}]; leave the module dense, or choose another codebook for it"
            )
        return out_features // TILE, in_features // TILE, int(TILE * self.k)

    def tensors(self, out_features: int, in_features: int) -> dict[str, Grid]:
        """See [`Codebook.tensors`]: the codes, and the table of a code that has one."""
        rows, tiles, words = self.codes_shape(out_features, in_features)
        grids = {"codes": Grid((rows * TILE, tiles * words // TILE), self.code_dtype)}
        return grids if self.table_shape is None else grids | {"table": Grid(self.table_shape, torch.float32)}

    def select_rows(self, tensors: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Codebook.select_rows`]: the row of tiles of each."""
        codes = tensors["codes"]
        groups = codes.reshape(len(codes) // TILE, -1).index_select(0, rows // TILE)
        return {**tensors, "codes": groups.reshape(len(rows) * TILE, codes.shape[1])}

    def cut(
        self, name: str, tensor: torch.Tensor, out_features: int, in_features: int, rows: slice, columns: slice
    ) -> torch.Tensor:
        """See [`Codebook.cut`]: some of the tiles, and the whole table."""
        if name != "codes":
            return tensor
        tiles = tensor.reshape(*self.codes_shape(out_features, in_features))
        part = tiles[rows.start // TILE : rows.stop // TILE, columns.start // TILE : columns.stop // TILE]
        return part.reshape(rows.stop - rows.start, -1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Codebook.encode`]: the points of a path that `viterbi.py` finds, which are near, if not always nearest.

        A code with a table encodes with the one of `trellis_tables.py`.

        Args:
            x: float32 [..., 256], tiles row by row.

        Returns:
            codes int16 [..., 16·K], and points.

        Raises:
            ValueError: x has another last dimension.
        """
        tiles = self.check_vectors(x)
        places, source = _places_on(self.order, x.device)
        values, metric = _encoder_on(self.name, x.device)
        states = viterbi.encode(tiles[:, places], metric, self.k)
        codes = viterbi.pack(states, viterbi.fresh_bits(self.k, self.step))
        points = values.index_select(0, states.flatten()).view(tiles.shape)[:, source]
        return codes.reshape(*x.shape[:-1], codes.shape[-1]), points.reshape(x.shape)

    def store(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """See [`Codebook.store`]: codes int16 [m/16, n/16, 16·K]."""
        stored = {"codes": codes.reshape(len(codes) * TILE, -1)}
        return stored if self.table is None else stored | {"table": self.table.to(codes.device)}

    def codes_of(self, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """See [`Codebook.codes_of`]: int16 [m/16, n/16, 16·K]."""
        return tensors["codes"].reshape(*self.codes_shape(len(tensors["codes"]), columns))

    @property
    def table(self) -> torch.Tensor | None:
        """The table that weights are quantized with: float32 [2^Q, V] on the CPU; None for a code without one."""
        return None if self.table_shape is None else default_table(self.code, *self.table_shape)

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`].

        Args:
            tensors: "codes", int16 [m, n/16·K] with m a multiple of 16; and for a code with a table "table", floating
                point [2^Q, V].
            columns: n.
            dtype: of the result; float32 values are rounded to it (exact in float16 except for 1mad and 2mad).

        Returns:
            [m, n] on the device of the codes.

        Raises:
            ValueError: codes or table do not fit this codebook.
        """
        codes = tensors["codes"]
        rows = codes.shape[0]
        grid = self.tensors(rows, columns)["codes"]
        if codes.dtype != grid.dtype or not grid.fits(codes.shape):
            raise ValueError(
                f"codes for {columns} columns of codebook {self.name!r} are int16 {list(grid.shape)}, got {codes.dtype} "
                f"{list(codes.shape)}"
            )
        values = self.values(tensors.get("table"), codes.device, dtype)
        weight = torch.empty(rows, columns, dtype=dtype, device=codes.device)
        together = max(1, DECODED_AT_ONCE // (TILE * columns)) * TILE if columns else rows
        for first in range(0, rows, max(together, 1)):
            part = codes[first : first + together].reshape(-1, int(TILE * self.k))
            sequence = values.index_select(0, _states(part, int(2 * self.k * self.step)).flatten())
            _lay_out(sequence, self.order, weight[first : first + together])
        return weight

    def values(self, table: torch.Tensor | None, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of every state: [65536, V] of this dtype.

        Raises:
            ValueError: the table is not [2^Q, V] floating point, or is given for a code without one.
        """
        if self.table_shape is None:
            if table is not None:
                raise ValueError(f"codebook {self.name!r} has no table, got {list(table.shape)}")
            return computed_on(self.code, device, dtype)
        if table is None or tuple(table.shape) != self.table_shape or not table.is_floating_point():
            given = "none" if table is None else f"{table.dtype} {list(table.shape)}"
            raise ValueError(f"codebook {self.name!r} needs a floating point table {list(self.table_shape)}, got {given}")
        index, negative = _index_on(self.code, self.table_shape[0], device)
        values = table.to(device=device, dtype=dtype)[index]
        if self.code == "hyb":
            values[:, 0] = torch.where(negative, -values[:, 0], values[:, 0])
        return values


def _states(words: torch.Tensor, pair_bits: int) -> torch.Tensor:
    """The states of tiles: words int16 [T, W] → int32 [T, 32·W / pair_bits], `pair_bits` = 2·K·V."""
    words = words.to(torch.int32) & 0xFFFF
    # 32 bits from the beginning of each word, the ring closed
    double = (words << 16) | words.roll(-1, 1)
    # 32 steps go through pair_bits words: state i of them begins in word ⌈i·pair_bits / 2⌉ // 16 of these
    begin = (torch.arange(32, device=words.device) * pair_bits + 1) // 2
    double = double.view(len(words), -1, pair_bits).index_select(2, begin // 16)
    return ((double >> (16 - begin % 16).to(torch.int32)) & 0xFFFF).flatten(1)


def _lay_out(sequence: torch.Tensor, order: str, weight: torch.Tensor) -> None:
    """Put the sequences of all tiles of weight [m, n], in the order of the tiles, where they belong."""
    sizes, row, column = ORDERS[order]
    tiles = (weight.shape[0] // TILE, weight.shape[1] // TILE)
    dimensions = (0, *(2 + d for d in row), 1, *(2 + d for d in column))
    # neighbours in the sequence are neighbours in a row: a pair is moved as one number of twice the size
    pair = {2: torch.int32, 4: torch.int64, 8: torch.complex128}[weight.element_size()]
    source = sequence.view(*tiles, *sizes).view(pair).permute(dimensions)
    weight.view(pair).view(source.shape).copy_(source)


@functools.lru_cache(maxsize=16)
def _places_on(order: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each weight of a tile's sequence its place in the tile, row by row; and the inverse."""
    sizes, row, column = ORDERS[order]
    source = torch.arange(TILE * TILE).view(sizes).permute(*row, *column).flatten()
    return source.argsort().to(device), source.to(device)


@functools.lru_cache(maxsize=16)
def _encoder_on(name: str, device: torch.device) -> tuple[torch.Tensor, viterbi.Metric]:
    """The values of every state, float32 [65536, V], and the same as integers."""
    book = Trellis.parse(name)
    values = book.values(book.table, torch.device("cpu")).view(STATES, -1)
    metric = viterbi.metric(values, book.k)
    return values.to(device), metric._replace(levels=metric.levels.to(device))


@table
def computed_values(code: str) -> torch.Tensor:
    """The value of every state in one of the codes `COMPUTED`: float32 [65536]."""
    s = torch.arange(STATES, dtype=torch.int64)
    if code == "1mad":
        return (_byte_sum((s * 34038481 + 76625530) & 0xFFFFFFFF) - 510).float() / 147.800537109375
    if code == "2mad":
        h = (s * 264435761 + 1013904223) & 0xFFFFFFFF
        return (_byte_sum((h + (h * 1664525 >> 32)) & 0xFFFFFFFF) - 510).float() / 147.800537109375
    if code == "mul1":
        # in units of 2^-18, in which product and sum are integers: 0x1EEE is 1774 of them
        exact = (_byte_sum((s * 0x83DCD12D) & 0xFFFFFFFF) + 1024) * 1774 - int(10.3828125 * 2**18)
        return (exact.double() / 2**18).half().float()
    h = s * 89226354 + 64248484 if code == "3inst" else s * 0xCBAC1FED
    h = (h & 0x8FFF8FFF) ^ 0x3B603B60
    # the sum of two float16 is exact in float32, so that it is rounded once
    high, low = ((half & 0xFFFF).to(torch.int16).view(torch.float16).float() for half in (h >> 16, h))
    return (high + low).half().float()


def _byte_sum(h: torch.Tensor) -> torch.Tensor:
    return (h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)


@functools.lru_cache(maxsize=32)
def computed_on(code: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[`computed_values`] on this device, in this dtype."""
    return computed_values(code).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=16)
def _index_on(code: str, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of the table for every state, and whether the first value of that row is to be negated."""
    index, negative = _table_index(code, rows)
    return index.to(device), negative.to(device)


@table
def _table_index(code: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.arange(STATES, dtype=torch.int64)
    bits = rows.bit_length() - 1
    h = s if code == "lut" else s * (s + 1)
    return (h >> ((15 if code == "hyb" else 16) - bits)) & (rows - 1), (h >> 15 & 1).bool()
