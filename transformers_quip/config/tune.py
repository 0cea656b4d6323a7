"""How a quantized model is tuned: the values of the option `tune` and their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MODES = ("none", "vectors", "blocks", "full")
MEMORY = ("auto", "fast", "low")
# Integers, and the least value of each.
_LEAST = {
    "batch_size": 1,
    "held_out": 2,
    "warmup": 0,
    "looks": 1,
    "code_rounds": 0,
    "code_windows": 1,
    "block_windows": 1,
}
_BLOCK_RATES = ("block_epochs", "block_learning_rate", "block_weight_rate")


@dataclass(frozen=True)
class TuneOptions:
    """How a quantized model is tuned.

    Attributes:
        mode: "none"; "vectors": su, sv and the norms are trained end to end, the codes are fixed; "blocks": each block is
            tuned while it is rounded, in QuIP#'s order, which also trains weights that are still dense; "full": first
            "blocks", then "vectors".
        learning_rate: of multipliers, which begin at 1; the highest of a schedule that warms up and then falls as a cosine.
        epochs: the number of times that every window is read.
        batch_size: windows in one step.
        held_out: windows that are never trained on; they select the best state, and decide whether the result is kept.
        warmup: steps until the learning rate is highest.
        looks: the number of times that the held-out windows are read during training.
        clip: largest norm of the gradient of all multipliers together.
        reverse: the share of KL(quantized ‖ dense) in the loss of training end to end; the rest is KL(dense ‖ quantized).
        norms: whether the weights of norms are trained as well.
        embeddings: whether the embeddings and the output embeddings are trained end to end as well. They must be dense; if
            they are tied, they stay tied.
        embedding_rate: their learning rate relative to the size of their entries, as a share of `learning_rate`.
        code_rounds: after the vectors, move codes in this many rounds. Each takes the gradient of some windows and moves
            the codes that should gain most to neighbouring points; it is undone unless held-out windows get better.
        code_windows: windows for the gradient of a round.
        code_share: share of all blocks of weights that move in the first round.
        memory: "fast" keeps all decoded weights and activations, "low" computes them again in the backward pass,
            "auto" decides by the free memory.
        seed: random seed of the order of the windows.
        block_windows: calibration windows on which a block is tuned; a quarter of their number more is used
            for comparing.
        block_epochs: the number of times that they are read after each group of linears.
        block_learning_rate: of multipliers, in a block.
        block_weight_rate: the learning rate of dense weights in a block, as a share of that one.
    """

    mode: str = "vectors"
    learning_rate: float = 5e-3
    epochs: float = 2.0
    batch_size: int = 4
    held_out: int = 16
    warmup: int = 4
    looks: int = 8
    clip: float = 1.0
    reverse: float = 0.3
    norms: bool = True
    embeddings: bool = False
    embedding_rate: float = 0.02
    code_rounds: int = 0
    code_windows: int = 12
    code_share: float = 1e-5
    memory: str = "auto"
    seed: int = 0
    block_windows: int = 64
    block_epochs: float = 1.0
    block_learning_rate: float = 3e-3
    block_weight_rate: float = 0.03

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"tune={self.mode!r} is not known, choose one of {', '.join(map(repr, MODES))}")
        if self.memory not in MEMORY:
            raise ValueError(f"tune: memory={self.memory!r} is not known, choose one of {', '.join(map(repr, MEMORY))}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"tune: {name}={value!r} must be an integer of at least {least}")
        for name in ("learning_rate", "epochs", "clip", "embedding_rate", "code_share", *_BLOCK_RATES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"tune: {name}={value!r} must be a number above 0")
        if isinstance(self.reverse, bool) or not isinstance(self.reverse, (int, float)) or not 0 <= self.reverse <= 1:
            raise ValueError(f"tune: reverse={self.reverse!r} must be a number from 0 to 1")
        for name in ("norms", "embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"tune: {name}={getattr(self, name)!r} must be True or False")

    @property
    def tunes_blocks(self) -> bool:
        """Whether blocks are tuned while they are rounded."""
        return self.mode in ("blocks", "full")

    @property
    def tunes_vectors(self) -> bool:
        """Whether the vectors are tuned end to end."""
        return self.mode in ("vectors", "full")

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | TuneOptions | None) -> TuneOptions:
        """Read the option `tune` of a config.

        Args:
            value: a mode, or a dictionary of the attributes above.

        Raises:
            ValueError: an unknown mode or option, or a value that cannot be used.
        """
        if isinstance(value, TuneOptions):
            return value
        if value is None:
            return cls(mode="none")
        if isinstance(value, str):
            return cls(mode=value)
        if not isinstance(value, Mapping):
            raise ValueError(f"tune={value!r} must be one of {', '.join(map(repr, MODES))} or a dictionary of options")
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f"tune has no option {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return asdict(self)

    def check_windows(self, count: int) -> None:
        """Raise `ValueError` if this number of windows of text is too small to train on some and hold out others."""
        if count < self.batch_size + self.held_out:
            raise ValueError(
                f"Tuning needs at least {self.batch_size} windows to train on and {self.held_out} held out, got {count}: "
                "give more text, or a smaller batch_size or held_out"
            )

    def steps(self, windows: int) -> int:
        """The number of steps of all epochs over this number of windows, at least one."""
        return max(1, round(self.epochs * windows / self.batch_size))

    def factor(self, step: int, steps: int) -> float:
        """The learning rate of a step, as a share of the highest one: a linear warm-up, then half a cosine."""
        return min(1.0, (step + 1) / max(self.warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
