"""A kernel with the arguments of a launch, to be compiled ahead of time, and the names of its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = ("cuda", "blackwell", "cdna", "rdna")


def arch_of(gpu: Any) -> str:
    """As `launch.arch` calls it."""
    return gpu.backend


def family_of(gpu: Any) -> str:
    """As `launch.family` calls it."""
    if gpu.backend == "hip":
        return "cdna" if gpu.warp_size == 64 else "rdna"
    return "blackwell" if gpu.arch >= 100 else "cuda"


@dataclass(frozen=True)
class Specimen:
    """A kernel and how it is launched.

    Attributes:
        kernel: the `triton.jit` function.
        arguments: name → type of the argument in Triton's notation ("*fp32", "i32").
        constants: name → value of the rest, or a function of the target (`GPUTarget`).
        warps: of a program, or a function of the target.
        stages: blocks that are on their way at once in a loop, a function of the target; None is Triton's own choice.
        multiples: the arguments that are multiples of 16, besides all pointers; a launch finds out by itself.
        launched: whether it is launched on a target.
        weights_in_loop: weights that a program decodes in one round of its main loop; 0 if that has no meaning.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int | Callable[[Any], int] = 4
    stages: Callable[[Any], int | None] = lambda gpu: None
    weights_in_loop: int = 0
    multiples: tuple[str, ...] = ()
    launched: Callable[[Any], bool] = lambda gpu: True

    def warps_on(self, gpu: Any) -> int:
        """Warps of a program on a target."""
        return self.warps(gpu) if callable(self.warps) else self.warps

    def options_on(self, gpu: Any) -> dict[str, int]:
        """The options of a program on a target, for Triton."""
        options = {"num_warps": self.warps_on(gpu), "num_stages": self.stages(gpu)}
        return {name: value for name, value in options.items() if value is not None}
