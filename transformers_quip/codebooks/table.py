"""Codebooks of a few hundred points in a table: encoding compares with every point."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from .base import Codebook


class TableCodebook(Codebook):
    """A code is the index of a point in a table of at most 256.

    Attributes:
        points: makes the table, float32 [points, block_size], on the CPU; the same one at every call.
    """

    code_dtype = torch.uint8
    points: Callable[[], torch.Tensor]

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`Codebook.encode`]; exact: it compares with every point."""
        rows = self.check_vectors(x)
        points = _on(self.points, rows.device, torch.float32)
        codes = _nearest(rows, points)
        return codes.to(torch.uint8).reshape(x.shape[:-1]), points[codes].reshape(x.shape)

    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """See [`Codebook.decode`]. The values come from the table, rounded to the dtype."""
        codes = tensors["codes"]
        flat = _on(self.points, codes.device, dtype).index_select(0, codes.reshape(-1).int())
        return flat.reshape(codes.shape[0], -1)[:, :columns]


@functools.lru_cache(maxsize=16)
def _on(points: Callable[[], torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return points().to(device=device, dtype=dtype)


def _nearest(x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of a few hundred points [P, d] for every x [N, d]: int64 [N]."""
    # The scores of 2048 rows stay in a CPU's cache.
    norms = points.square().sum(1) / 2
    parts = [torch.addmm(norms, part, points.T, beta=-1).argmax(1) for part in x.split(2048)]
    return torch.cat(parts) if parts else x.new_empty(0, dtype=torch.int64)
