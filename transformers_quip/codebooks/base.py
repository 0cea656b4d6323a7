"""The interface of every codebook."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

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


# Columns that are rounded between two large matrix products, and at most in one call of a compiled `round_panel`.
PANEL = 128
# Names that a stored tensor cannot have: they belong to the layers.
RESERVED = ("weight", "bias", "su", "sv", "row_scales", "factor_in", "factor_out")


class Grid(NamedTuple):
    """One tensor that a layer stores for its weight: shape and type.

    Attributes:
        shape: of the tensor. A dimension is None if its size is known only after encoding, such as the length of a stream
            whose rows differ in length; any size fits it.
        dtype: the integer type of the tensor; or a floating type, which stands for the dtype of the layer's su and sv.
        expected: the expected size of the dimension that is None. Plans count it; results count the real size.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    expected: int = 0

    def empty_shape(self) -> tuple[int, ...]:
        """The shape in a layer that has no values yet: 0 where a dimension is not known."""
        return tuple(size or 0 for size in self.shape)

    def dtype_in(self, scales_dtype: torch.dtype | None) -> torch.dtype | None:
        """The type of the tensor in a layer whose su and sv have this type."""
        return scales_dtype if self.dtype.is_floating_point else self.dtype

    def nbytes(self, scales_dtype: torch.dtype) -> int:
        """Bytes of the tensor, with the expected size where a dimension is not known."""
        dtype = scales_dtype if self.dtype.is_floating_point else self.dtype
        return math.prod(self.expected if size is None else size for size in self.shape) * dtype.itemsize

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor may have this shape."""
        return len(shape) == len(self.shape) and all(
            size is None or size == given for size, given in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
        return f"{'floating point' if self.dtype.is_floating_point else self.dtype} [{sizes}]"


class Codebook(abc.ABC):
    """A finite set of points in R^(rows_together · block_size); a weight matrix is a grid of codes, each naming one point.

    Codes have two forms. While weights are rounded there is one integer for each block, whatever the codebook: `encode`
    and `round_panel` return those. A layer keeps, and a checkpoint stores, the tensors that `store` makes of them at the
    end, without unused bits. `tensors` names and describes them, and `decode` reads them. Only the codebook knows
    their number and their meaning.

    Attributes:
        name: as in the config. Everything that decoding depends on is in the name.
        bits: code bits per weight.
        block_size: columns that are coded together: neighbours in a row.
        rows_together: rows that are coded together: 1, or the height of a tile.
        code_dtype: integer type of one code while weights are rounded.
        gaussian_scale: rms of the weights, in units of the points, at which Gaussian weights are quantized with the
            least error, or with which the codebook was published (its `opt_scale`); the codebook's file says which.
        scale_factors: multiples of it that are worth trying for a weight.
        residual_scale: factor of the points of a second stage; None for a codebook of one stage.
        is_read_only: whether it is only for checkpoints that were made elsewhere, and encodes nothing.
        refinement_sweeps: passes over the codes after the first rounding that are worth their time, if the user sets no
            number.
        kernels: the family of compiled kernels that compute with the stored tensors, if there is one. None: layers run
            through PyTorch.
    """

    name: str
    bits: float
    block_size: int
    rows_together: int = 1
    code_dtype: torch.dtype
    gaussian_scale: float
    scale_factors: tuple[float, ...] = (0.9, 0.95, 1.0, 1.05)
    residual_scale: float | None = None
    is_read_only: bool = False
    refinement_sweeps: int = 10
    kernels: Literal["e8p", "trellis"] | None = None

    def with_residual_scale(self, scale: float) -> Codebook:
        """The same codebook with another `residual_scale`. Raises `ValueError` for a codebook of one stage."""
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

    def tensors(self, out_features: int, in_features: int) -> dict[str, Grid]:
        """The tensors that a [out_features, in_features] layer stores for its weight, by name and in their order.

        The first is called "codes": a quantized layer in a checkpoint is recognised by it. The others may have any names
        except those in `RESERVED`. Names and order are the same for every size.
        """
        return {"codes": Grid(self.codes_shape(out_features, in_features), self.code_dtype)}

    def store(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored form of codes as [`encode`] returns them: tensors as [`tensors`] describes them.

        Args:
            codes: `code_dtype` [rows, blocks].
        """
        return {"codes": codes}

    def codes_of(self, tensors: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        """The inverse of [`store`]: codes as [`encode`] returns them, in a grid.

        Args:
            tensors: as [`tensors`] describes them.
            columns: the number of weights in a row.

        Raises:
            TypeError: the codebook packs its codes, and has no method of its own that takes them apart.
        """
        if type(self).store is not Codebook.store:
            raise TypeError(f"codebook {self.name!r} has no method codes_of, so its codes cannot be changed")
        return tensors["codes"]

    def select_rows(self, tensors: Mapping[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of some rows of a weight with the rows that are coded together with them, for embeddings.

        Decoded, they are k groups of `rows_together` rows; row i of the request is row rows[i] % rows_together of group i.
        The default is for codebooks whose tensors have one row for each such group; others override it.

        Args:
            tensors: as [`tensors`] describes them.
            rows: int32 or int64 [k], each below the number of rows.
        """
        groups = rows if self.rows_together == 1 else rows // self.rows_together
        return {name: tensor.index_select(0, groups) for name, tensor in tensors.items()}

    @property
    def columns_together(self) -> int:
        """The number of columns of which a part of a weight must be a multiple, so that its codes can be stored apart."""
        return self.block_size

    def cut(
        self, name: str, tensor: torch.Tensor, out_features: int, in_features: int, rows: slice, columns: slice
    ) -> torch.Tensor:
        """The part of a stored tensor that belongs to some rows and columns, for several devices; a view if possible.

        The default is for tensors with one row for each `rows_together` rows, in which the codes of the columns follow one
        another; codebooks with others override it.

        Args:
            name: of the tensor.
            tensor: of a [out_features, in_features] weight, as [`tensors`] describes it.
            rows, columns: begin and end, multiples of `rows_together` and `columns_together`.
        """
        begin, end = (at * tensor.shape[1] // in_features for at in (columns.start, columns.stop))
        return tensor[rows.start // self.rows_together : rows.stop // self.rows_together, begin:end]

    def check(self, tensors: Mapping[str, torch.Tensor], out_features: int, in_features: int) -> None:
        """Raise `ValueError` for tensors that do not fit a [out_features, in_features] layer of this codebook."""
        grids = self.tensors(out_features, in_features)
        if tensors.keys() != grids.keys():
            raise ValueError(f"codebook {self.name!r} stores {', '.join(grids)}, got {', '.join(tensors) or 'nothing'}")
        for name, grid in grids.items():
            tensor = tensors[name]
            of_type = tensor.is_floating_point() if grid.dtype.is_floating_point else tensor.dtype == grid.dtype
            if not of_type or not grid.fits(tensor.shape):
                raise ValueError(
                    f"{name} of a [{out_features}, {in_features}] layer of codebook {self.name!r} must be {grid}, got "
                    f"{tensor.dtype} {list(tensor.shape)}"
                )

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
    def decode(self, tensors: Mapping[str, torch.Tensor], columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The points of stored codes.

        Args:
            tensors: as [`tensors`] describes them.
            columns: the number of weights in a row; the rest of the last block is dropped.
            dtype: of the result.

        Returns:
            [rows, columns] on the device of the tensors.
        """

    def check_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """The vectors of [`encode`] as float32 [N, numbers]; raises `ValueError` for another last dimension."""
        numbers = self.rows_together * self.block_size
        if x.shape[-1:] != (numbers,):
            raise ValueError(f"{self.name} encodes vectors of {numbers} numbers, got shape {tuple(x.shape)}")
        return x.reshape(-1, numbers).float()
