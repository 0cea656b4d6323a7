"""The compiled CPU library: plain C behind ctypes, so that one build serves every version of Python and PyTorch.

The library is built at install time if a C compiler is found. Without it, or on a processor for which it was not built,
[`is_available`] is False, and callers fall back to PyTorch, which gives the same results more slowly.
"""

from __future__ import annotations

import torch

from .cpu_library import library, loaded

MOST_COLUMNS = 256  # of a panel, fixed in the C source
# The codebooks of a second stage after E8P, by their numbers in the C source. Codes are then int32: the E8P code, and
# below it 8 bits (E8) or 16 bits (E8P) for the second stage.
SECOND_STAGES = {None: 0, "e8": 1, "e8p": 2}


def is_available() -> bool:
    """Whether the compiled library can be used."""
    return library() is not None


def e8p_encode(x: torch.Tensor, second: str | None = None, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest E8P points p, or p + scale·q with q the point of a second stage nearest to (x − p) / scale.

    Args:
        x: float32 [N, 8], contiguous, on the CPU.
        second: the second stage, "e8" or "e8p", or None.
        scale: its scale, not 0.

    Returns:
        codes [N], int16 or, with a second stage, int32 (see `SECOND_STAGES`), and points float32 [N, 8].
    """
    _check(x, "x")
    if x.ndim != 2 or x.shape[1] != 8:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [N, 8]")
    codes = torch.empty(x.shape[0], dtype=_code_dtype(second))
    points = torch.empty_like(x)
    loaded().quip_encode(
        x.data_ptr(),
        x.shape[0],
        SECOND_STAGES[second],
        scale,
        codes.data_ptr(),
        points.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, points


def e8p_round_panel(
    target: torch.Tensor,
    base: torch.Tensor,
    feedback: torch.Tensor,
    second: str | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a panel of columns block by block, from the last block to the first, with feedback.

    For block k:  x_k = target_k + Σ_{j>k} delta_j feedback[j, k],  points_k = nearest(x_k),  delta_k = base_k − points_k.

    Args:
        target, base: float32 [rows, columns], contiguous; columns a multiple of 8, at most `MOST_COLUMNS`.
        feedback: float32 [columns, columns]; only entries with a row in a later block than the column are read.
        second, scale: of a second stage, as for [`e8p_encode`].

    Returns:
        codes [rows, columns/8] as of [`e8p_encode`], points and delta float32 [rows, columns].
    """
    rows, columns = _check_panel(target, base, feedback)
    codes = torch.empty(rows, columns // 8, dtype=_code_dtype(second))
    points, delta = torch.empty_like(target), torch.empty_like(target)
    failed = loaded().quip_round_panel(
        target.data_ptr(),
        base.data_ptr(),
        feedback.data_ptr(),
        rows,
        columns,
        SECOND_STAGES[second],
        scale,
        codes.data_ptr(),
        points.data_ptr(),
        delta.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(f"a panel has 8 to {MOST_COLUMNS} columns in multiples of 8, got {columns}")
    return codes, points, delta


def scalar_round_panel(
    target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor, largest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as [`e8p_round_panel`] for the grid of the points k − largest/2, k = 0 … largest; every column is a block.

    Args:
        target, base, feedback: as there, with any number of columns up to `MOST_COLUMNS`.
        largest: 1 to 255.

    Returns:
        codes uint8 [rows, columns], the numbers k, and points and delta float32 [rows, columns].
    """
    rows, columns = _check_panel(target, base, feedback)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    points, delta = torch.empty_like(target), torch.empty_like(target)
    failed = loaded().quip_round_panel_scalar(
        target.data_ptr(),
        base.data_ptr(),
        feedback.data_ptr(),
        rows,
        columns,
        largest,
        codes.data_ptr(),
        points.data_ptr(),
        delta.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(
            f"a panel has 1 to {MOST_COLUMNS} columns and a grid 2 to 256 points, got {columns}, {largest + 1}"
        )
    return codes, points, delta


def _check_panel(target: torch.Tensor, base: torch.Tensor, feedback: torch.Tensor) -> tuple[int, int]:
    rows, columns = target.shape
    for tensor, name, shape in (
        (target, "target", (rows, columns)),
        (base, "base", (rows, columns)),
        (feedback, "feedback", (columns, columns)),
    ):
        _check(tensor, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    return rows, columns


def _code_dtype(second: str | None) -> torch.dtype:
    if second not in SECOND_STAGES:
        raise ValueError(f"second={second!r} must be one of {', '.join(map(repr, SECOND_STAGES))}")
    return torch.int16 if second is None else torch.int32


def _check(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a contiguous float32 tensor on the CPU, got {tensor.dtype} on {tensor.device}")
