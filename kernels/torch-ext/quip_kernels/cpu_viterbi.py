"""The encoder of trellis codes on the CPU; `transformers_quip.codebooks.viterbi` defines its result to the bit."""

from __future__ import annotations

import torch

from .cpu_library import default_level, loaded

STATES = 1 << 16
TILE_WEIGHTS = 256


def search(
    x: torch.Tensor,
    levels: torch.Tensor,
    fresh: tuple[int, int],
    doublings: int,
    window: int,
    passes: int,
    level: int | None = None,
) -> torch.Tensor:
    """The closed path of every tile: the same states as of `transformers_quip.codebooks.viterbi.search`.

    Args:
        x: int16 [N, T, V] on the CPU, T·V = 256, V = 1 or 2.
        levels: int16 [V, 65536] on the CPU.
        fresh: new bits of states with an even number and of the others, 1 to 16.
        doublings: 0 to 15.
        window: steps of the first pass, even, 2 to T.
        passes: those after it, at least 1.
        level: instruction set, an index of `cpu_library.LEVELS`; None: `default_level`.

    Returns:
        The states, int32 [N, T].

    Raises:
        ValueError: an argument is not as described.
    """
    weights = len(levels)
    for name, tensor, shape in (
        ("x", x, (len(x), TILE_WEIGHTS // max(weights, 1), weights)),
        ("levels", levels, (weights, STATES)),
    ):
        if tensor.dtype != torch.int16 or not tensor.is_cpu or tuple(tensor.shape) != shape or weights not in (1, 2):
            raise ValueError(
                f"{name} of the trellis encoder must be int16 {list(shape)} on the CPU with 1 or 2 weights for each state, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    x, levels = x.contiguous(), levels.contiguous()
    states = torch.empty(x.shape[:2], dtype=torch.int16)
    failed = loaded().quip_viterbi(
        x.data_ptr(),
        len(x),
        levels.data_ptr(),
        weights,
        *fresh,
        doublings,
        window,
        passes,
        states.data_ptr(),
        default_level() if level is None else level,
        torch.get_num_threads(),
    )
    if failed == -2:
        raise MemoryError(f"no memory to encode {len(x)} tiles with a trellis")
    if failed:
        raise ValueError(
            f"the library has no trellis with fresh={fresh}, doublings={doublings}, window={window}, passes={passes}"
        )
    return states.int() & 0xFFFF
