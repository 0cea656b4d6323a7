"""Moves of codes: a few blocks of a quantized model go to neighbouring points of their codebooks, where it helps.

The gradient G of the loss with respect to a decoded weight, taken over some windows, says which moves should gain. In the
points Ŵ of the codebook it is the *slope* S = Q_outᵀ diag(sv) G diag(su) Q_in, and a block whose points change by Δ gains
−⟨S, Δ⟩ to first order. Errors of moves that use one input add up, so a gradient is right only for few of them: a round
moves a hundred-thousandth of the blocks, at most one in a row, those with the largest predicted gain (PV-Tuning's largest
moves, arXiv 2405.14852, section 3). It is kept if the model is better on held-out windows by more than the noise; else a
quarter of the moves is tried. Points are found by the codebook's own encoder, so every codebook takes part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from .. import codebooks
from ..calibration.curvature import only_activations_need_gradients
from ..calibration.device import evaluating
from ..checkpoints.durable import durable
from ..config.tune import TuneOptions
from ..memory import free_memory
from ..nn import QuipLinear
from ..nn.replace import quantized_linears
from . import processes
from .guard import Verdict, window_divergences
from .head import Head
from .loss import divergence_of, window_order
from .product import product_dtype
from .state import read_run
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = "codes.safetensors"
# Blocks for which a neighbouring point is looked for, for each one that moves.
_CANDIDATES = 20
# Fewer moves are tried this often, each time this share of those before.
_TRIES, _FEWER = 3, 4
# After a round that helped, the next one moves this many times as many.
_MORE = 1.5
# Distances at which a neighbouring point is looked for, in rms errors of a block.
_DISTANCES = (1.0, 1.5, 2.0, 3.0, 4.0)
# Share of the free memory that decoded weights and their gradients may fill; other linears take part in other rounds.
_SHARE = 0.5


@dataclass
class CodesReport:
    """The result of moving codes.

    Attributes:
        verdict: the comparison on held-out windows with the model before.
        moved: the number of blocks that moved.
        blocks: of how many.
        history: [{"round", "moved", "predicted", "held_out"}]; "moved" is 0 for a round that was undone.
    """

    verdict: Verdict
    moved: int = 0
    blocks: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For config.json and reports: JSON-serializable."""
        after, before = self.verdict.after, self.verdict.before
        return {"before": round(before, 5), "after": round(after, 5), "moved": self.moved, "blocks": self.blocks}


class _Taken(NamedTuple):
    """What `StoredTensors.take` reads."""

    tensors: Mapping[str, torch.Tensor]
    su: torch.Tensor
    sv: torch.Tensor


class SummedProduct(torch.autograd.Function):
    """x Wᵀ; the backward pass adds the gradient with respect to W to a sum in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """x [..., n] in any floating dtype, weight [m, n], total float32 [m, n] → [..., m] in the dtype of x."""
        ctx.save_for_backward(x)
        ctx.weight, ctx.total = weight, total
        return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient with respect to x, in its dtype."""
        (x,) = ctx.saved_tensors
        own = gradient.to(ctx.weight.dtype)
        ctx.total.add_(own.flatten(0, -2).T @ x.to(own.dtype).flatten(0, -2))
        return (own @ ctx.weight).to(gradient.dtype), None, None


class MovableLinear(nn.Module):
    """Stands in for a quantized linear while gradients of its weight are summed.

    Args:
        quantized: that linear. Its codebook must be able to encode.
    """

    def __init__(self, quantized: QuipLinear):
        super().__init__()
        self._quantized = (quantized,)  # in a tuple it is not a part of this module
        self.bias = quantized.bias
        self.weight = quantized.dequantize(torch.float32).to(product_dtype(quantized.su.device))
        self.total = torch.zeros(self.weight.shape, dtype=torch.float32, device=self.weight.device)

    @property
    def base_layer(self) -> QuipLinear:
        """That linear."""
        return self._quantized[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype."""
        y = SummedProduct.apply(x, self.weight, self.total)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def slope(self) -> torch.Tensor:
        """The gradient with respect to the points Ŵ: float32 [m, n]."""
        return slope_of(self.base_layer, self.total)


def slope_of(linear: QuipLinear, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with respect to the points Ŵ of a linear, from that with respect to its weight: float32 [m, n]."""
    rows = linear.su.float() * gradient * linear.sv.float()[:, None]
    rows = torch.ops.quip.transform(rows, linear.incoherence_in, linear.seed, True)
    return torch.ops.quip.transform(rows.T.contiguous(), linear.incoherence_out, linear.seed, True).T.contiguous()


class Candidates(NamedTuple):
    """Blocks of one linear that may move, at most one in each row of blocks.

    Attributes:
        rows, columns: int64 [k], where the blocks are.
        points: float32 [k, weights of a block], where they are in the codebook's space.
        slopes: of the same shape, the gradient with respect to them.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    points: torch.Tensor
    slopes: torch.Tensor

    def only(self, chosen: torch.Tensor) -> Candidates:
        """Some of them."""
        return Candidates(*(part[chosen] for part in self))

    @property
    def steepness(self) -> torch.Tensor:
        """The norm of each slope: float32 [k]."""
        return self.slopes.norm(dim=-1)


class Moves(NamedTuple):
    """Moves of blocks of one linear, at most one in each row of blocks.

    Attributes:
        rows, columns: int64 [k], where the blocks are.
        codes: [k] of the codebook's type, where they go.
        gains: float32 [k], the gain that the gradient predicts for each.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    codes: torch.Tensor
    gains: torch.Tensor

    def only(self, chosen: torch.Tensor) -> Moves:
        """Some of them."""
        return Moves(*(part[chosen] for part in self))


@torch.no_grad()
def steepest_blocks(book: codebooks.Codebook, points: torch.Tensor, slope: torch.Tensor) -> Candidates:
    """The block with the steepest slope in each row of blocks.

    Args:
        book: the codebook of the points.
        points: Ŵ, float32 [m, n].
        slope: the gradient with respect to them, of the same shape.
    """
    complete = (0, -points.shape[1] % book.block_size)
    old, slopes = (book.to_blocks(nn.functional.pad(matrix, complete)) for matrix in (points, slope))
    columns = slopes.norm(dim=-1).argmax(dim=1)
    rows = torch.arange(len(columns), device=columns.device)
    return Candidates(rows, columns, old[rows, columns], slopes[rows, columns])


@torch.no_grad()
def best_moves(book: codebooks.Codebook, candidates: Candidates) -> Moves:
    """Moves of these blocks against their slopes, to the first other point on the way that should gain."""
    points, slopes = candidates.points, candidates.slopes
    directions = slopes / candidates.steepness[:, None].clamp_min(1e-30)
    # the rms error of a block of Gaussian weights, a third above the bound of the rate-distortion function
    radius = book.gaussian_scale * 2.0**-book.bits * math.sqrt(1.3 * points.shape[-1])
    still = torch.arange(len(points), device=points.device)
    parts: list[Moves] = []
    for distance in _DISTANCES:
        codes, found = book.encode(points[still] - distance * radius * directions[still])
        gains = ((points[still] - found) * slopes[still]).sum(-1)
        moves = Moves(candidates.rows[still], candidates.columns[still], codes, gains)
        parts.append(moves.only(gains > 0))
        still = still[gains <= 0]
        if not len(still):
            break
    return Moves(*(torch.cat(same) for same in zip(*parts, strict=True)))


@torch.no_grad()
def apply_moves(linear: QuipLinear, moves: Moves) -> None:
    """Store other codes in a quantized linear; su, sv and the other codes stay."""
    book = codebooks.get(linear.codebook)
    tensors = linear.stored()
    codes = book.codes_of(tensors, linear.su.shape[0]).clone()
    codes[moves.rows, moves.columns] = moves.codes
    linear.take(_Taken({**tensors, **book.store(codes)}, linear.su, linear.sv), linear.su.device)


def check_movable(model: nn.Module) -> dict[str, QuipLinear]:
    """The quantized linears of a model whose codes can move, by name: plain ones, of codebooks that can encode.

    Raises:
        ValueError: there are none, or several processes tune together.
    """
    if processes.count() > 1:
        raise ValueError("codes are moved by one process: tune without code_rounds, and then again in one process")
    found = quantized_linears(model).items()
    linears = {n: one for n, one in found if type(one) is QuipLinear and not codebooks.get(one.codebook).is_read_only}
    if not linears:
        raise ValueError(f"{type(model).__name__} has no quantized linears whose codes could be chosen again")
    return linears


@torch.inference_mode(False)
@torch.enable_grad()
def move_codes(
    model: PreTrainedModel,
    teacher: Teacher,
    head: Head,
    options: TuneOptions,
    folder: Path | None = None,
    mark: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CodesReport:
    """Move codes of a quantized model, in place, in `options.code_rounds` rounds.

    Args:
        model: quantized.
        teacher: the dense model's states over windows of text; the last `options.held_out` are never used for gradients.
        head: of the model.
        options: of the tuning.
        folder: for the state of the run, which a stopped run resumes from.
        mark: identifies the run.
        progress: show a tqdm bar.

    Raises:
        ValueError: see [`check_movable`].
    """
    linears = check_movable(model)
    return _Mover(model, linears, teacher, head, options, folder, dict(mark or {})).run(progress)


class _Mover:
    """All rounds of one run; see [`move_codes`]."""

    def __init__(
        self,
        model: PreTrainedModel,
        linears: dict[str, QuipLinear],
        teacher: Teacher,
        head: Head,
        options: TuneOptions,
        folder: Path | None,
        mark: dict[str, Any],
    ):
        self.model, self.linears, self.teacher, self.head = model, linears, teacher, head
        self.options, self.mark = options, mark
        self.path = None if folder is None else folder / FILE
        count = len(teacher.ids) - options.held_out
        self.held_out = range(count, len(teacher.ids))
        self.order = window_order(count, options.code_rounds * options.code_windows, options.seed + 1)
        self.share = options.code_share
        self.changed: set[str] = set()
        blocks = sum(_blocks(linear) for linear in linears.values())
        self.before = self.now = self._divergences()
        self.report = CodesReport(Verdict.of(self.before, self.before), 0, blocks)

    def run(self, progress: bool) -> CodesReport:
        """Make all rounds."""
        first = self._resume()
        rounds, size = self.options.code_rounds, self.options.code_windows
        with tqdm(total=rounds, initial=first, desc="Codes", unit="round", disable=not progress) as bar:
            for number in range(first, rounds):
                self._round(number, self.order[number * size : (number + 1) * size])
                self._keep(number + 1)
                bar.update()
                bar.set_postfix_str(f"{self.report.moved} moved, held out {self.now.mean().item():.3f}")
        self.report.verdict = Verdict.of(self.before, self.now)
        return self.report

    def _divergences(self) -> torch.Tensor:
        return window_divergences(self.model, self.teacher, self.head, self.held_out)

    def _round(self, number: int, chosen: Sequence[int]) -> None:
        groups = _groups(self.linears)
        names = groups[number % len(groups)]
        count = max(1, round(self.share * sum(_blocks(self.linears[name]) for name in names)))
        found = self._candidates(names, chosen, count * _CANDIDATES)
        moved, predicted = 0, 0.0
        for _ in range(_TRIES):
            largest = _largest({name: moves.gains for name, moves in found.items()}, count)
            moves = {name: found[name].only(chosen) for name, chosen in largest.items()}
            predicted = sum(one.gains.sum().item() for one in moves.values())
            if self._helps(moves):
                moved = sum(len(one.rows) for one in moves.values())
                self.share *= _MORE
                break
            self.share /= _FEWER
            count = max(1, count // _FEWER)
        self.report.moved += moved
        held = self.now.mean().item()
        self.report.history.append({"round": number + 1, "moved": moved, "predicted": predicted, "held_out": held})

    def _helps(self, moves: Mapping[str, Moves]) -> bool:
        """Make these moves, and undo them unless the model is better by more than the noise."""
        before = {name: _copy(self.linears[name]) for name in moves}
        for name, one in moves.items():
            apply_moves(self.linears[name], one)
        now = self._divergences()
        if Verdict.of(self.now, now).accepted:
            self.now = now
            self.changed |= set(moves)
            return True
        for name, taken in before.items():
            self.linears[name].take(taken, taken.su.device)
        return False

    def _candidates(self, names: Sequence[str], chosen: Sequence[int], most: int) -> dict[str, Moves]:
        """Moves of these linears, from the gradient of these windows: of the `most` blocks with the steepest slopes."""
        tokens = len(chosen) * self.teacher.ids.shape[1]
        linears = {name: self.linears[name] for name in names}
        with (
            _movable(self.model, linears) as stand_ins,
            evaluating(self.model),
            only_activations_need_gradients(self.model),
        ):
            for index in chosen:
                loss = divergence_of(self.model, self.teacher, self.head, [index], self.options.reverse)
                (loss / tokens).backward()
        books = {name: codebooks.get(linear.codebook) for name, linear in linears.items()}
        found = {
            name: steepest_blocks(books[name], _points(linear), stand_ins.pop(name).slope())
            for name, linear in linears.items()
        }
        steep = _largest({name: one.steepness for name, one in found.items()}, most)
        return {name: best_moves(books[name], found[name].only(chosen)) for name, chosen in steep.items()}

    def _keep(self, done: int) -> None:
        """Write the run down."""
        if self.path is None:
            return
        tensors = {
            f"{name}:{kind}": tensor.cpu().contiguous()
            for name in sorted(self.changed)
            for kind, tensor in self.linears[name].stored().items()
        }
        tensors["before"] = self.before
        about = {"fingerprint": self.mark, "done": done, "share": self.share, "report": asdict(self.report)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with durable(self.path) as temporary:
            save_file(tensors, temporary, {"run": json.dumps(about)})

    def _resume(self) -> int:
        """The number of rounds that are done; their codes are in the model again."""
        found = None if self.path is None else read_run(self.path, self.mark)
        if found is None:
            return 0
        about, tensors = found
        self.before = tensors.pop("before")
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition(":")
            stored.setdefault(name, {})[kind] = tensor
        for name, own in stored.items():
            linear = self.linears[name]
            linear.take(_Taken(own, linear.su, linear.sv), linear.su.device)
        self.changed, self.share, self.now = set(stored), about["share"], self._divergences()
        self.report.moved, self.report.history = about["report"]["moved"], about["report"]["history"]
        return about["done"]


def _blocks(linear: QuipLinear) -> int:
    """The number of blocks of its weight."""
    book = codebooks.get(linear.codebook)
    return math.prod(book.codes_shape(linear.sv.shape[0], linear.su.shape[0])[:2])


def _points(linear: QuipLinear) -> torch.Tensor:
    """Ŵ in float32."""
    return codebooks.get(linear.codebook).decode(linear.stored(), linear.su.shape[0], torch.float32)


def _copy(linear: QuipLinear) -> _Taken:
    stored = {name: tensor.clone() for name, tensor in linear.stored().items()}
    return _Taken(stored, linear.su.detach(), linear.sv.detach())


def _largest(values: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Which of these numbers are among the `count` largest of all: booleans by name, without names that have none."""
    every = torch.cat([v.cpu() for v in values.values()] or [torch.empty(0)])
    if not len(every):
        return {}
    least = every.topk(min(count, len(every))).values[-1]
    chosen = {name: v >= least.to(v) for name, v in values.items()}
    return {name: which for name, which in chosen.items() if which.any()}


def _groups(linears: Mapping[str, QuipLinear]) -> list[list[str]]:
    """The names in groups, whose decoded weights and gradients fit into memory together; at least one in each."""
    device = next(iter(linears.values())).su.device
    room = _SHARE * free_memory(device)
    groups: list[list[str]] = [[]]
    size = 0
    for name, linear in linears.items():
        own = linear.in_features * linear.out_features * (4 + product_dtype(device).itemsize)
        if groups[-1] and size + own > room:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


@contextmanager
def _movable(model: nn.Module, linears: Mapping[str, QuipLinear]) -> Iterator[dict[str, MovableLinear]]:
    """A context in which these linears are replaced by stand-ins that sum their gradients."""
    stand_ins = {name: MovableLinear(linear) for name, linear in linears.items()}
    try:
        for name, one in stand_ins.items():
            model.set_submodule(name, one)
        yield stand_ins
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
