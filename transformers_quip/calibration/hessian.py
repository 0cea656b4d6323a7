"""Second moments of activations: the Hessian H = E[x xᵀ] of a linear's proxy loss (QuIP#, arXiv 2402.04396)."""

from __future__ import annotations

import torch

from .device import cpu_matmul_precision

# Tokens in one float32 product: enough to make adding it to the float64 sum cheap, few enough to keep float32 rounding
# below 1e-6 and copies small.
_TOKENS = 4096
# Columns in one panel of the product: bounds the transient to _COLUMNS * size floats, and skips the lower triangle.
_COLUMNS = 256


class _MomentAccumulator:
    """A float64 sum of x yᵀ over tokens: float32 products a panel of columns and a chunk of tokens at a time."""

    def __init__(self, size: int, device: torch.device | str = "cpu", name: str = ""):
        self.size = size
        self.name = name or "the linear"
        self.tokens = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)

    def _accumulate(self, x: torch.Tensor, y: torch.Tensor, upper: bool) -> None:
        for tensor in (x, y):
            if tensor.shape[-1] != self.size or tensor.shape != x.shape or not tensor.is_floating_point():
                raise ValueError(
                    f"Inputs of {self.name} must be floating point [..., {self.size}], of one shape, got "
                    f"{list(tensor.shape)} of {tensor.dtype}."
                )
        x, y = x.reshape(-1, self.size), y.reshape(-1, self.size)
        # bfloat16 numbers lose nothing as bfloat16 factors, and oneDNN adds their products in float32: exact and
        # faster.
        exact_in_bf16 = x.dtype == y.dtype == torch.bfloat16
        with cpu_matmul_precision("bf16" if exact_in_bf16 else "ieee"):
            for left, right in zip(x.split(_TOKENS), y.split(_TOKENS), strict=True):
                left = left.to(self._sum.device, torch.float32)
                right = left if y is x else right.to(self._sum.device, torch.float32)
                for start in range(0, self.size, _COLUMNS):
                    rows = slice(start, start + _COLUMNS)
                    first = start if upper else 0
                    self._sum[rows, first:] += left[:, rows].T @ right[:, first:]
        self.tokens += len(x)

    def _check(self, statistic: torch.Tensor) -> None:
        if self.tokens == 0:
            raise ValueError(f"No activations were seen for {self.name}: it did not run on the calibration data.")
        bad = ~statistic.isfinite()
        if bad.any():
            raise ValueError(
                f"The calibration inputs of {self.name} hold NaN or Inf in column {int(bad.nonzero()[0, 0])} (of "
                f"{self.size}; {int(bad.sum()) if bad.ndim == 1 else int(bad.any(-1).sum())} columns in all). The "
                "model overflows in its dtype, or its weights do: load it with dtype=torch.float32."
            )


class HessianAccumulator(_MomentAccumulator):
    """Accumulates the Hessian H = E[x xᵀ] over the tokens of many batches.

    Products are computed in float32 and summed in float64, upper triangle only. The sum takes 8·size² bytes (1.6 GB
    for 14336 columns), `hessian()` another 4·size²; the transient is a few MB.

    Args:
        size: the number of columns n.
        device: where to accumulate; inputs are moved there chunk by chunk. It must know float64.
        name: of the module, for error messages.

    Attributes:
        tokens: the number of x summed so far.
    """

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., n], of any float dtype.

        Raises:
            ValueError: another number of columns, or not floating point.
        """
        self._accumulate(x, x, upper=True)

    @torch.no_grad()
    def hessian(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The mean of x xᵀ, [n, n], exactly symmetric.

        Raises:
            ValueError: no tokens were added, or an activation was NaN or Inf (every such value reaches the diagonal).
        """
        self._check(self._sum.diagonal())
        result = torch.empty(self.size, self.size, dtype=dtype, device=self._sum.device)
        for start in range(0, self.size, _COLUMNS):
            rows, after = slice(start, start + _COLUMNS), start + _COLUMNS
            panel = (self._sum[rows, start:] / self.tokens).to(dtype)
            square = panel[:, :_COLUMNS].triu()
            result[rows, rows] = square + square.triu(1).T
            result[rows, after:] = panel[:, _COLUMNS:]
            result[after:, rows] = panel[:, _COLUMNS:].T
        return result


class CrossMomentAccumulator(_MomentAccumulator):
    """Accumulates C = E[x yᵀ] of two inputs for the same tokens, such as the dense model's and the quantized model's.

    Arguments, arithmetic and memory as in `HessianAccumulator`, without the symmetry.
    """

    @torch.no_grad()
    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the tokens of x and y, both [..., n] and of one shape, of any float dtype.

        Raises:
            ValueError: shapes differ, another number of columns, or not floating point.
        """
        self._accumulate(x, y, upper=False)

    @torch.no_grad()
    def moment(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The mean of x yᵀ, [n, n].

        Raises:
            ValueError: no tokens were added, or an activation was NaN or Inf.
        """
        self._check(self._sum)
        return (self._sum / self.tokens).to(dtype)
