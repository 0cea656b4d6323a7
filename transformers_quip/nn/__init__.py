"""The modules that take the place of dense linears."""

from .linear import QuipLinear

__all__ = ["QuipLinear"]
