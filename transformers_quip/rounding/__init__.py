"""Rounding methods: which point of the codebook each block of the weight becomes.

A new method is a [`Rounding`] subclass in a file of its own, registered here, or from outside by [`register`].
"""

from __future__ import annotations

from ..registry import Registry
from .base import Problem, Rounded, Rounding, proxy_loss
from .convex import Convex
from .greedy import Greedy
from .ldlq import LDLQ
from .ldlq_rg import LDLQRG
from .nearest import Nearest
from .quantease import QuantEase
from .stochastic import Stochastic
from .yaqa import YAQA

__all__ = ["Problem", "Rounded", "Rounding", "get", "names", "proxy_loss", "register"]

_ROUNDINGS: Registry[Rounding] = Registry("rounding")


def register(name: str, method: Rounding) -> None:
    """Add a rounding method, so that a config can name it.

    It is used while a model is quantized, and not needed to load or run the result.

    Args:
        name: as `QuipConfig(rounding=name)` will have it; the method's own `name` must be the same.
        method: see [`Rounding`] for its interface, and [`Problem`] for its input. A method that needs a Hessian
            (`needs_hessian = True`) is replaced by the nearest points if a run has no calibration data.

    Raises:
        ValueError: the name is taken, or the method has another name.
        TypeError: the object is not a [`Rounding`].

    Example: the better one of two methods.

        class BetterOfTwo(rounding.Rounding):
            name = "better-of-two"
            needs_hessian = True
            rows_independent = False  # one choice for the whole weight

            def round(self, problem):
                found = [rounding.get(name).round(problem) for name in ("ldlq", "greedy")]
                return min(found, key=lambda one: self.loss(problem, one))

            def loss(self, problem, rounded):
                return rounding.proxy_loss(problem.weight - rounded.points, problem.required_hessian)

        rounding.register("better-of-two", BetterOfTwo())
        QuipConfig(rounding="better-of-two")
    """
    if not isinstance(method, Rounding):
        raise TypeError(f"rounding.register takes an instance of a rounding.Rounding subclass, got {method!r}")
    if method.name != name:
        raise ValueError(f"the rounding method that was registered as {name!r} is called {method.name!r}")
    _ROUNDINGS.register(name, method)


for _rounding in (LDLQ(), LDLQRG(), Greedy(), QuantEase(), Convex(), Nearest(), Stochastic(), YAQA()):
    register(_rounding.name, _rounding)


def names() -> tuple[str, ...]:
    """The methods that a config can name."""
    return _ROUNDINGS.names()


def get(name: str) -> Rounding:
    """The method of this name. Raises `ValueError` for an unknown one."""
    return _ROUNDINGS[name]
