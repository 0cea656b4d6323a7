"""A codebook of tiles for tests: every weight of a tile of 16x16 is ± the tile's one magnitude."""

from __future__ import annotations

import itertools

import torch

from transformers_quip import codebooks
from transformers_quip.codebooks import Codebook, Grid

TILE = 16
MAGNITUDES = (0.3, 0.6, 0.9, 1.4)


class Tiles(Codebook):
    """A code is 32 bytes of signs and the number of the magnitude, so that a tile's weights cannot be coded one by one."""

    name = "test-tiles"
    bits = 33 * 8 / TILE**2
    block_size = rows_together = TILE
    code_dtype = torch.uint8
    gaussian_scale = 1.0

    def codes_shape(self, out_features, in_features):
        return (*super().codes_shape(out_features, in_features), 33)

    def tensors(self, out_features, in_features):
        if out_features % TILE:
            raise ValueError(f"codebook {self.name!r} needs a multiple of {TILE} rows, got {out_features}")
        rows, columns, _ = self.codes_shape(out_features, in_features)
        return {"codes": Grid((rows, columns * 33), self.code_dtype)}

    def store(self, codes):
        return {"codes": codes.flatten(1)}

    def encode(self, x):
        tiles = self.check_vectors(x)
        magnitudes = torch.tensor(MAGNITUDES, device=x.device)
        best = (tiles.abs()[:, None] - magnitudes[:, None]).square().sum(-1).argmin(1)
        bits = (tiles >= 0).reshape(len(tiles), 32, 8).int() << torch.arange(8, device=x.device)
        codes = torch.cat([bits.sum(-1), best[:, None]], 1).to(torch.uint8)
        points = torch.where(tiles >= 0, 1.0, -1.0) * magnitudes[best][:, None]
        return codes.reshape(*x.shape[:-1], 33), points.reshape(x.shape)

    def decode(self, tensors, columns, dtype=torch.float32):
        stored = tensors["codes"]
        codes = stored.reshape(len(stored), -1, 33)
        signs = (codes[..., :32, None].int() >> torch.arange(8, device=codes.device)) & 1
        magnitudes = torch.tensor(MAGNITUDES, dtype=dtype, device=codes.device)[codes[..., 32].long()]
        blocks = (2 * signs.flatten(2).to(dtype) - 1) * magnitudes[..., None]
        return self.from_blocks(blocks)[:, :columns].contiguous()


def nearest_tile(tile: torch.Tensor) -> torch.Tensor:
    """The nearest point to a tile [16, 16], in its dtype, by trying every magnitude for all weights in loops."""
    trials = []
    for magnitude in MAGNITUDES:
        point = torch.empty_like(tile)
        for row, column in itertools.product(range(TILE), range(TILE)):
            value = tile[row, column].item()
            point[row, column] = min((magnitude, -magnitude), key=lambda choice, value=value: (value - choice) ** 2)
        trials.append(point)
    return min(trials, key=lambda point: (tile - point).square().sum().item())


def nearest(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest points to a matrix of whole tiles, tile by tile."""
    result = torch.empty_like(matrix)
    for row, column in itertools.product(range(0, len(matrix), TILE), range(0, matrix.shape[1], TILE)):
        part = slice(row, row + TILE), slice(column, column + TILE)
        result[part] = nearest_tile(matrix[part])
    return result


def register(monkeypatch) -> Tiles:
    """Make it known for the time of a test."""
    monkeypatch.setattr(codebooks._CODEBOOKS, "_entries", dict(codebooks._CODEBOOKS._entries))
    codebooks._get.cache_clear()
    book = Tiles()
    codebooks.register(book.name, book)
    return book
