"""Both sides' Hessians of linears from the gradients of the model's own loss: YAQA's sketches (arXiv 2505.22988).

The Hessian of the KL divergence to the model itself is the Fisher information: the second moment of the gradients of the
log-likelihood of labels that are drawn from the model's own predictions. For a linear with the weight W [m, n], an input x
of a token and the gradient g of its output, sketch A takes tokens as independent, and sketch B takes sequences so, with
G = Σ g xᵀ over the tokens of one:

    A:  H_in = E[‖g‖² x xᵀ],  H_out = E[‖x‖² g gᵀ]        B:  H_in = E[Gᵀ G],  H_out = E[G Gᵀ]

with sizes [n, n] and [m, m]. Each is one step of a power iteration, from the identity, to the nearest Kronecker product
H_out ⊗ H_in. The weights of A and the products of B have long tails: a few tokens, or sequences, make up most of the sums,
so both need many. The sketch "outputs" takes x and g as independent (K-FAC, arXiv 1503.05671): H_out = E[g gᵀ], and H_in is
the Hessian that one-sided rounding has, of the inputs that the model quantized so far computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from .arguments import without_cache
from .device import evaluating, execution_device
from .precision import calibration_autocast, cpu_matmul_precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of all sums of one pass over the sequences; with more linears there are several passes.
BUDGET = 8 << 30
OUTPUTS = "outputs"


@dataclass
class Curvature:
    """The two Hessians of one linear, each up to a factor.

    Attributes:
        hessian_out: float32 [m, m].
        hessian_in: float32 [n, n]; None for the sketch "outputs", which leaves it to the calibration.
        sequences: the number of sequences in the sums; 0 for a linear that none reached.
    """

    hessian_out: torch.Tensor
    hessian_in: torch.Tensor | None = None
    sequences: int = 0

    @classmethod
    def empty(cls, rows: int, columns: int, sketch: str, device: torch.device | None = None) -> Curvature:
        """Sums of nothing."""
        inner = None if sketch == OUTPUTS else torch.zeros(columns, columns, device=device)
        return cls(torch.zeros(rows, rows, device=device), inner)

    def add(self, gradient: torch.Tensor, x: torch.Tensor, sketch: str) -> None:
        """Add one sequence.

        Args:
            gradient: [T, m], of the output.
            x: [T, n], the input.
            sketch: "outputs", "A" or "B".
        """
        gradient, x = gradient.float(), x.float()
        if self.hessian_in is None:
            self.hessian_out.addmm_(gradient.T, gradient)
        elif sketch == "B":
            product = gradient.T @ x
            self.hessian_in.addmm_(product.T, product)
            self.hessian_out.addmm_(product, product.T)
        else:
            self.hessian_in.addmm_((x * gradient.square().sum(1, keepdim=True)).T, x)
            self.hessian_out.addmm_((gradient * x.square().sum(1, keepdim=True)).T, gradient)
        self.sequences += 1


@torch.inference_mode(False)
def collect_curvature(
    model: PreTrainedModel,
    names: Sequence[str],
    token_ids: torch.Tensor,
    seed: int = 0,
    sketch: str = OUTPUTS,
    budget: int = BUDGET,
    progress: bool = True,
    kept: KeptSums | None = None,
) -> dict[str, Curvature]:
    """The two Hessians of linears of a dense model, from one forward and one backward pass of each sequence.

    Args:
        model: dense, in memory; its parameters do not change.
        names: of its linears.
        token_ids: int64 [N, T].
        seed: of the labels.
        sketch: "outputs", "A" or "B", see above.
        budget: bytes of all sums of one pass; each further pass over the sequences costs as much time.
        progress: show a tqdm bar.
        kept: where sums are kept, so that a stopped run resumes.

    Returns:
        The name of a linear → its Hessians, on its device; without those that no sequence reached.

    Raises:
        ValueError: a gradient is NaN or Inf.
    """
    parts = _parts(model, names, budget, sketch)
    device = execution_device(model.get_input_embeddings())
    result: dict[str, Curvature] = {}
    with (
        evaluating(model),
        only_activations_need_gradients(model),
        tqdm(total=len(parts) * len(token_ids), desc="Gradients", unit="sequence", disable=not progress) as bar,
    ):
        for number, part in enumerate(parts):
            generator = torch.Generator().manual_seed(seed)  # the same labels in each pass
            sums = {name: _sum(model.get_submodule(name), sketch) for name in part}
            done = kept.read(number, sums) if kept is not None else 0
            bar.update(done)
            _draw(generator, done * token_ids.shape[1])
            with _observed(model, sums, sketch):
                for index, ids in enumerate(token_ids[done:], start=done + 1):
                    _backward(model, ids[None].to(device), generator)
                    bar.update()
                    if kept is not None:
                        kept.keep(number, sums, index, last=index == len(token_ids))
            result |= {name: found for name, found in sums.items() if found.sequences}
    for name, found in result.items():
        if not all(side.isfinite().all() for side in (found.hessian_in, found.hessian_out) if side is not None):
            raise ValueError(
                f"the gradients of {name} have NaN or Inf: load the model with dtype=torch.float32 or bfloat16"
            )
    return result


class KeptSums(Protocol):
    """Where the sums of each pass over the sequences are kept."""

    def read(self, number: int, sums: Mapping[str, Curvature]) -> int:
        """Fill in the sums of a pass, and return the number of sequences in them; 0 where nothing is kept."""
        ...

    def keep(self, number: int, sums: Mapping[str, Curvature], done: int, last: bool) -> None:
        """The sums of a pass have `done` sequences, which are all in the `last` call."""
        ...


def _shape(module: nn.Module) -> tuple[int, int]:
    """(rows, columns) of the weight of a linear; a Conv1D keeps it transposed."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _sum(module: nn.Module, sketch: str) -> Curvature:
    return Curvature.empty(*_shape(module), sketch, module.get_parameter("weight").device)


def sums_bytes(rows: int, columns: int, sketch: str) -> int:
    """Bytes of the sums of a linear."""
    return 4 * (rows * rows + (0 if sketch == OUTPUTS else columns * columns))


def _parts(model: nn.Module, names: Sequence[str], budget: int, sketch: str) -> list[list[str]]:
    """The names in order, in parts whose sums fit in the budget; at least one linear in each."""
    parts: list[list[str]] = []
    used = 0
    for name in names:
        size = sums_bytes(*_shape(model.get_submodule(name)), sketch)
        if not parts or used + size > budget:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return parts


def _draw(generator: torch.Generator, tokens: int) -> torch.Tensor:
    """Numbers from [0, 1) for the labels of tokens, float32 [tokens, 1]."""
    return torch.rand(tokens, 1, generator=generator)


def _backward(model: PreTrainedModel, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Propagate the gradient of the log-likelihood of labels from the model's own predictions, for one sequence."""
    with torch.enable_grad(), calibration_autocast(model):
        logits = model(input_ids=ids, **without_cache(model)).logits
    chances = logits.detach()[0].float().softmax(-1)
    drawn = _draw(generator, len(chances)).to(chances)
    # the label is the first whose cumulated chance is above a number drawn from [0, total)
    cumulated = chances.cumsum(-1)
    labels = torch.searchsorted(cumulated, drawn * cumulated[:, -1:]).clamp_max(chances.shape[1] - 1)
    gradient = chances.scatter_add_(1, labels, chances.new_full(labels.shape, -1.0))
    with cpu_matmul_precision("bf16"):
        logits.backward(gradient[None].to(logits.dtype))


@contextmanager
def _observed(model: nn.Module, sums: dict[str, Curvature], sketch: str) -> Iterator[None]:
    """A context in which every backward pass through these linears adds to their sums."""

    def watch(found: Curvature) -> Any:
        def after(_: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            x = arguments[0].detach().flatten(0, -2)
            if output.requires_grad:
                output.register_hook(lambda gradient: found.add(gradient.flatten(0, -2), x, sketch))

        return after

    hooks = [model.get_submodule(name).register_forward_hook(watch(found)) for name, found in sums.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def only_activations_need_gradients(model: PreTrainedModel) -> Iterator[None]:
    """A context in which no parameter has a gradient, and the output of the embeddings needs one."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter in needed:
            parameter.requires_grad_(True)
