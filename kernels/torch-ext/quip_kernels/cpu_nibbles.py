"""E8P and E8 codes expanded to four bits a weight, which processors with AVX2 multiply several times as fast as codes.

codes           nibbles                         weights
int16 [m, c]    uint8 [m/16, 2c, 8, 4]          E8P: q = (4 w + 11) / 2, from 0 to 11
uint8 [m, c]    int8 [m/16, 2c, 8, 4]           E8: q = 2 w + 4, from 0 to 8

Byte [t, k, r, i] has the q of row 16 t + r and column 4 k + i in its lower half, and that of row 16 t + r + 8 in its upper
half. Both forms hold the same weights exactly, and each can be made from the other.
"""

from __future__ import annotations

import torch

from .cpu import SECOND_STAGES
from .cpu_library import loaded

TILE = 16  # rows
FIRST, SECOND = 1, 2  # stages of a layer in nibbles, as common.h numbers them
_CODES = {torch.uint8: torch.int16, torch.int8: torch.uint8}
DTYPES = {codes: nibbles for nibbles, codes in _CODES.items()}  # of nibbles, by that of codes
_CODEBOOK = {torch.int16: SECOND_STAGES["e8p"], torch.uint8: SECOND_STAGES["e8"]}


def is_nibbles(tensor: torch.Tensor) -> bool:
    """Whether this tensor of a weight is nibbles, and not codes."""
    return tensor.ndim == 4 and tensor.dtype in _CODES


def can_expand(codes: torch.Tensor) -> bool:
    """Whether these are codes of E8P or E8 on the CPU, of whole tiles."""
    return codes.dtype in DTYPES and codes.ndim == 2 and codes.is_cpu and codes.shape[0] % TILE == 0 and codes.numel() > 0


def expand(codes: torch.Tensor) -> torch.Tensor:
    """Codes of E8P (int16 [m, c]) or E8 (uint8 [m, c]) as nibbles; m a multiple of 16.

    Raises:
        ValueError: the codes are not as described.
    """
    if not can_expand(codes):
        raise ValueError(
            f"codes to expand must be int16 or uint8 [m, c] on the CPU, m a multiple of {TILE}, got {codes.dtype} "
            f"{list(codes.shape)} on {codes.device}"
        )
    rows, blocks = codes.shape
    nibbles = torch.empty(rows // TILE, 2 * blocks, TILE // 2, 4, dtype=DTYPES[codes.dtype])
    codes = codes.contiguous()
    loaded().quip_to_nibbles(
        _CODEBOOK[codes.dtype], codes.data_ptr(), rows, blocks, nibbles.data_ptr(), torch.get_num_threads()
    )
    return nibbles


def collapse(nibbles: torch.Tensor) -> torch.Tensor:
    """The codes of nibbles: the inverse of [`expand`].

    Raises:
        ValueError: the tensor is not nibbles, or not those of points of the codebook.
    """
    rows, blocks = shape_of_codes(nibbles)
    codes = torch.empty(rows, blocks, dtype=_CODES[nibbles.dtype])
    nibbles, codebook = nibbles.contiguous(), _CODEBOOK[codes.dtype]
    arguments = (codebook, nibbles.data_ptr(), rows, blocks, codes.data_ptr(), torch.get_num_threads())
    if loaded().quip_from_nibbles(*arguments):
        raise ValueError("these nibbles were not expanded from codes: some of their blocks are not points of the codebook")
    return codes


def shape_of_codes(nibbles: torch.Tensor) -> tuple[int, int]:
    """[m, c] of the codes of nibbles. Raises `ValueError` if the tensor is not nibbles on the CPU."""
    if not is_nibbles(nibbles) or nibbles.shape[2:] != (TILE // 2, 4) or nibbles.shape[1] % 2 or not nibbles.is_cpu:
        raise ValueError(
            f"nibbles must be uint8 or int8 [m/{TILE}, 2c, {TILE // 2}, 4] on the CPU, got {nibbles.dtype} "
            f"{list(nibbles.shape)} on {nibbles.device}"
        )
    return nibbles.shape[0] * TILE, nibbles.shape[1] // 2


def codes_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of codes, or of the codes that nibbles were expanded from."""
    return _CODES[tensor.dtype] if is_nibbles(tensor) else tensor.dtype


def bytes_of_codes(tensor: torch.Tensor) -> int:
    """Bytes of codes, or of the codes that nibbles were expanded from."""
    if not is_nibbles(tensor):
        return tensor.numel() * tensor.element_size()
    return tensor.shape[0] * TILE * (tensor.shape[1] // 2) * _CODES[tensor.dtype].itemsize
