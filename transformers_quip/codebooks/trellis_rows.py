"""Rows of an embedding in a trellis code, with a scale for each 256 weights: the token tables of EXL3 since exllamav3 1.5.

**Codes** of a table [m, n], n a multiple of 256: int16 [m, n/256·(1 + 16·K)], as EXL3 stores them. Each 256 neighbours of a
row have 1 + 16·K words, K = 1 to 8 whole bits: first the bits of their scale, a float16; then the symbols of a ring, K bits
for each weight, which run through each word from its lowest bit up:

    bit b of a ring            (word[1 + b // 16] >> b % 16) & 1
    symbol i, i = 0 … 255      bits i·K … i·K + K − 1, the first being the lowest
    bit j of state i           bit j mod K of symbol (i − j // K) mod 256,  j = 0 … 15
    weight i                   scale · value(state i), code mul1 of `trellis.py`

**Name**: `trellis-rows:mul1:kK`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .base import Codebook
from .trellis import DECODED_AT_ONCE, STATE_BITS, WHOLE_BITS, computed_on

GROUP = 256
PREFIX = "trellis-rows:"
_NAME = re.compile(PREFIX + "mul1:k([1-8])")


class TrellisRows(Codebook):
    """See the file's description.

    Args:
        k: bits of a symbol, 1 to 8.
    """

    block_size = GROUP
    code_dtype = torch.int16
    is_read_only = True

    def __init__(self, k: int):
        if k not in WHOLE_BITS:
            raise ValueError(f"{PREFIX}mul1 has 1 to 8 bits, got {k}")
        self.k, self.name = k, f"{PREFIX}mul1:k{k}"
        self.bits = self.words * 16 / GROUP

    @classmethod
    def parse(cls, name: str) -> TrellisRows:
        """The codebook of this name. Raises `ValueError` if there is none."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not a codebook: rows in a trellis code are called {PREFIX}mul1:kK, K = 1 to 8")
        return cls(int(match[1]))

    @property
    def words(self) -> int:
        """Words of a group."""
        return 1 + 16 * self.k

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """See [`Codebook.codes_shape`]. Raises `ValueError` for rows that are not whole groups."""
        if in_features % GROUP:
            raise ValueError(f"codebook {self.name!r} has groups of {GROUP} weights, and a row has {in_features}")
        return out_features, in_features // GROUP * self.words

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises `ValueError`: this codebook is only read."""
        raise ValueError(f"codebook {self.name!r} is for EXL3 checkpoints: nothing here quantizes with it")

    def scales(self, codes: torch.Tensor) -> torch.Tensor:
        """The scale of every group, float16 [m, n/256], of codes as the file describes them."""
        return codes.reshape(len(codes), -1, self.words)[..., 0].contiguous().view(torch.float16)

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`].

        Raises:
            ValueError: the codes do not fit.
        """
        codes = tensors["codes"]
        shape = self.codes_shape(len(codes), columns)
        if codes.dtype != self.code_dtype or tuple(codes.shape) != shape:
            raise ValueError(
                f"codes of {columns} columns of codebook {self.name!r} are int16 {list(shape)}, got {codes.dtype} "
                f"{list(codes.shape)}"
            )
        values = computed_on("mul1", codes.device, torch.float32 if dtype.itemsize < 4 else dtype)
        table = torch.empty(len(codes), columns, dtype=dtype, device=codes.device)
        together = max(1, DECODED_AT_ONCE // max(columns, 1))
        for first in range(0, len(codes), together):
            part = codes[first : first + together]
            groups = part.reshape(len(part), -1, self.words)
            found = values[self._states(groups[..., 1:])] * self.scales(part)[..., None].to(values.dtype)
            table[first : first + together] = found.flatten(1)
        return table

    def _states(self, words: torch.Tensor) -> torch.Tensor:
        """The states of rings: int16 [..., 16·K] → int32 [..., 256]."""
        at = torch.arange(GROUP, device=words.device) * self.k
        words = words.to(torch.int32) & 0xFFFF
        two = words | (words.roll(-1, -1) << 16)
        symbols = (two[..., at // 16] >> (at % 16).to(torch.int32)) & ((1 << self.k) - 1)
        states = torch.zeros_like(symbols)
        for back in range(-(-STATE_BITS // self.k)):
            states |= symbols.roll(back, -1) << (back * self.k)
        return states & 0xFFFF
