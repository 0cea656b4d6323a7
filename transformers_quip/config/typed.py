"""The options of QuipConfig for editors and type checkers: keywords with types, and typed attributes.

The table in `options` is the source: a test compares the names, their order and the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TypedOptions:
    """The attributes and the signature of `QuipConfig`."""

    bits: float
    codebook: str | None
    residual_scale: float | None
    incoherence: str | list[str]
    tensor_parallel: int | None
    rescale: bool
    rounding: str
    dataset: Any
    tokenizer: Any
    text_column: str
    calibrate_on: str
    outside_blocks: str
    num_samples: int
    sequence_length: int
    batch_size: int
    damping: float
    sketch: str
    sketch_samples: int
    refinement_sweeps: int | None
    refit: int
    scale: str | float
    modules_to_not_convert: list[str] | None
    modules: dict[str, dict[str, Any]] | None
    tune: str | dict[str, Any]
    seed: int

    def __init__(
        self,
        *,
        bits: float = 2,
        codebook: str | None = None,
        residual_scale: float | None = None,
        incoherence: str | Sequence[str] = "hadamard",
        tensor_parallel: int | None = None,
        rescale: bool = True,
        rounding: str = "ldlq",
        dataset: Any = "self",
        tokenizer: Any = None,
        text_column: str = "text",
        calibrate_on: str = "mixed",
        outside_blocks: str = "dense",
        num_samples: int = 256,
        sequence_length: int = 512,
        batch_size: int = 8,
        damping: float = 0.01,
        sketch: str = "outputs",
        sketch_samples: int = 64,
        refinement_sweeps: int | None = None,
        refit: int = 0,
        scale: str | float = "auto",
        modules_to_not_convert: Sequence[str] | None = None,
        modules: dict[str, dict[str, Any]] | None = None,
        tune: str | dict[str, Any] = "none",
        seed: int = 0,
    ) -> None:
        raise NotImplementedError("QuipConfig has an __init__ of its own, which reads the table of options")
