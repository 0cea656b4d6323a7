"""What every codebook offers."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def table(function: Callable) -> Callable:
    """Cache a function that builds a constant, and let it build on the CPU.

    Transformers builds models under torch.device("meta"); a table made first there would be cached without values.
    """

    @functools.cache
    @functools.wraps(function)
    def build(*arguments):
        with torch.device("cpu"):
            return function(*arguments)

    return build


class Grid(NamedTuple):
    """A tensor of stored codes: one row for each row of the weight."""

    shape: tuple[int, int]
    dtype: torch.dtype


class Codebook(abc.ABC):
    """A finite set of points in R^(rows_together · block_size); a weight matrix is a grid of codes, each naming one point.

    Codes have two forms. While weights are rounded there is one integer for each block, whatever the codebook: that is
    what `encode` and `round_panel` return. What a layer keeps, and a checkpoint stores, is made of them at the end by
    `store`: one tensor, or two where a second stage refines the first, without unused bits.

    Attributes:
        name: as the config calls it.
        bits: code bits per weight.
        block_size: columns that are coded together: neighbours in a row.
        rows_together: rows that are coded together: 1, or the height of a tile.
        code_dtype: integer type of one code while weights are rounded.
        gaussian_scale: rms of the weights, in units of the points, at which Gaussian weights are quantized with the
            least error, or with which the codebook was published (its `opt_scale`); the codebook's file says which.
        scale_factors: multiples of it that are worth trying for a weight.
        residual_scale: what the points of a second stage are multiplied by; None for a codebook of one stage.
        table_shape: of the table that decoding needs besides the codes, for a codebook that has one in the checkpoint.
        is_read_only: whether it is only for checkpoints that were made elsewhere, and encodes nothing.
    """

    name: str
    bits: float
    block_size: int
    rows_together: int = 1
    code_dtype: torch.dtype
    gaussian_scale: float
    scale_factors: tuple[float, ...] = (0.9, 0.95, 1.0, 1.05)
    residual_scale: float | None = None
    table_shape: tuple[int, int] | None = None
    is_read_only: bool = False

    @property
    def has_residual(self) -> bool:
        """Whether codes are stored as two tensors, a second stage refining the first."""
        return self.residual_scale is not None

    def with_residual_scale(self, scale: float) -> Codebook:
        """The same codebook with another `residual_scale`. Raises `ValueError` where there is no second stage."""
        raise ValueError(f"residual_scale={scale} was given, but codebook {self.name!r} has no second stage")

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the codes of a [out_features, in_features] weight while it is rounded.

        That is [out_features / rows_together, in_features / block_size], both rounded up, and the dimensions of one code
        where it is not a single number.
        """
        return math.ceil(out_features / self.rows_together), math.ceil(in_features / self.block_size)

    def to_blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [m, n] of complete blocks as [m / rows_together, n / block_size, rows_together · block_size].

        The weights of one block stand row by row.
        """
        rows = len(matrix)
        if self.rows_together == 1:
            return matrix.reshape(rows, -1, self.block_size)
        tiles = matrix.reshape(rows // self.rows_together, self.rows_together, -1, self.block_size).transpose(1, 2)
        return tiles.reshape(*tiles.shape[:2], -1)

    def from_blocks(self, blocks: torch.Tensor) -> torch.Tensor:
        """The inverse of [`to_blocks`]."""
        if self.rows_together == 1:
            return blocks.reshape(blocks.shape[0], -1)
        tiles = blocks.reshape(*blocks.shape[:2], self.rows_together, self.block_size).transpose(1, 2)
        return tiles.reshape(blocks.shape[0] * self.rows_together, -1)

    def layout(self, out_features: int, in_features: int) -> tuple[Grid, ...]:
        """Shape and type of the stored codes of a weight: one grid, two for a codebook of two stages."""
        return (Grid(self.codes_shape(out_features, in_features), self.code_dtype),)

    def store(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The stored form of codes as [`encode`] returns them: tensors as [`layout`] describes them.

        Args:
            codes: `code_dtype` [rows, blocks].
        """
        return (codes,)

    @abc.abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest point of every vector.

        Args:
            x: float32 [..., rows_together · block_size], see [`to_blocks`].

        Returns:
            codes [...] of `code_dtype` (and the dimensions of one code), and the points, float32 of the shape of x on its
            device.
        """

    def round_panel(
        self, target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode a panel of columns block by block, from the last block to the first, with feedback.

        For block k:  x_k = target_k + Σ_{j>k} delta_j feedback[j, k],  points_k = nearest(x_k),
        delta_k = base_k − points_k.  Every sequential rounding method is this loop with its own matrices.

        Args:
            target, base: float32 [rows, columns], multiples of `rows_together` and `block_size`.
            feedback: float32 [columns, columns]; only blocks below the diagonal are read.

        Returns:
            codes as [`codes_shape`] has them, points and delta float32 [rows, columns].
        """
        size = self.block_size
        wanted = target.clone()
        points, delta = torch.empty_like(target), torch.empty_like(target)
        codes = torch.empty(self.codes_shape(*target.shape), dtype=self.code_dtype, device=target.device)
        for block in reversed(range(target.shape[1] // size)):
            begin, end = block * size, (block + 1) * size
            codes[:, block], found = self.encode(wanted[:, begin:end].reshape(-1, self.rows_together * size))
            points[:, begin:end] = found.reshape(-1, size)
            delta[:, begin:end] = base[:, begin:end] - points[:, begin:end]
            wanted[:, :begin].addmm_(delta[:, begin:end], feedback[begin:end, :begin])
        return codes, points, delta

    @abc.abstractmethod
    def decode(
        self,
        codes: torch.Tensor,
        columns: int,
        dtype: torch.dtype = torch.float32,
        codes_residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The points of stored codes.

        Args:
            codes, codes_residual: as [`layout`] describes them; the second for a codebook of two stages only.
            columns: how many weights of a row are real; what completes the last block is dropped.
            dtype: of the result.

        Returns:
            [rows, columns] on the device of the codes.
        """

    def check_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """The vectors of [`encode`] as float32 [N, numbers]; raises `ValueError` for another last dimension."""
        numbers = self.rows_together * self.block_size
        if x.shape[-1:] != (numbers,):
            raise ValueError(f"{self.name} encodes vectors of {numbers} numbers, got shape {tuple(x.shape)}")
        return x.reshape(-1, numbers).float()
