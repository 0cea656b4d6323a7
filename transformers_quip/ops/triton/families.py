"""The families of Triton kernels, each with a test on small random inputs: what a device must prove before it is trusted.

The truth is PyTorch on the CPU: the formulas of `reference`, in float64. Inputs have the sizes and dtypes that take every
way through a kernel: rows and columns that are not multiples of a tile, one vector and several, one stage and two. Most of
the time goes into compiling, so no kernel is compiled in more forms than these ways need
(`kernels/benchmarks/self_check.py` counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quip_kernels import layout

from ... import codebooks, incoherence
from ...codebooks import viterbi
from ..layer import Layer
from .route import Encoder, Family, digits

if TYPE_CHECKING:
    from quip_kernels.gpu.quantize import Digits

# Relative errors (of norms) that rounding of the inputs and outputs to these types explains.
ERROR = {torch.float32: 3e-6, torch.float16: 8e-4, torch.bfloat16: 4e-3}
# Transforms: with a Hadamard factor of order 12 or 36, or none.
_TRANSFORMS = ((96, (torch.float32,)), (576, (torch.bfloat16,)), (1024, tuple(ERROR)))
# Rows and columns: multiples of all tiles, in two parts, as models have them; and multiples of none.
_EVEN, _UNEVEN = (16, 2048), (40, 136)
_TRELLIS = (32, 800)
# Experts without vectors, with one, with a few, and with more than a tile; two vectors have no expert.
_ENDS = (0, 1, 1, 7, 47)
_CODES = ("trellis:mul1:k2:exl3", "trellis:3inst:k3:rows", "trellis:mul1:k2.5:exl3", "trellis:hyb-q9v2:k2:qtip")


def check(family: Family, device: torch.device) -> None:
    """Run the kernels of a family on a device and compare them.

    Raises:
        ArithmeticError: a result is wrong; the message says which and by how much.
        Exception: whatever the compiler or the driver raises.
    """
    _CHECKS[family](device)


def _transform(device: torch.device) -> None:
    from quip_kernels.gpu import transform as kernels

    for size, dtypes in _TRANSFORMS:
        q = incoherence.get("hadamard", size, 0)
        factors = q.dense_factors
        if factors is None:
            raise ArithmeticError(f"the transform of {size} numbers is not a product of matrices")
        plan, x = kernels.make_plan(size, factors, device), _random(3, size)
        signs = torch.where(_random(1, size, seed=2)[0] < 0, -1.0, 1.0)
        for dtype in dtypes:
            rows, count = x.to(dtype), digits(dtype, "exact")
            for transpose, apply in ((False, q.apply), (True, q.apply_transpose)):
                found = kernels.transform(rows.to(device), plan, transpose, dtype)
                _compare(found, apply(rows.double()), ERROR[dtype], f"transform of {size} numbers in {dtype}")
            made = kernels.transform_quantize(rows.to(device), plan, signs.to(device), count)
            wanted, most = q.apply_transpose(rows.double() * signs), 3e-6 if count == 3 else 2e-4
            _compare(_of_digits(made, size), wanted, most, f"digits of a transform of {size} numbers in {dtype}")
            sums = (made.sums.double().cpu() * 256.0 ** torch.arange(count)).sum(1) * made.scales.double().cpu()
            _compare(sums, wanted.sum(1), 1e-4 * 256.0 ** (3 - count), f"sums of digits of {size} numbers in {dtype}")


def _of_digits(digits: Digits, columns: int) -> torch.Tensor:
    """The numbers float64 [M, columns] that digits stand for."""
    rows, count, groups, words = digits.bytes.shape
    apart = digits.bytes.cpu().contiguous().view(torch.int8).reshape(rows, count, groups, words, 4)
    # digit d of number 32 w + 4 g + b
    in_order = apart.permute(0, 1, 3, 2, 4).reshape(rows, count, -1)[..., :columns].double()
    return (in_order * 256.0 ** torch.arange(count)[:, None]).sum(1) * digits.scales.double().cpu()[:, None]


def _stages(codebook: str, rows: int, columns: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Random stored tensors of a codebook, and the weight float64 that they stand for."""
    book = codebooks.get(codebook)
    stored = {}
    for name, grid in book.tensors(rows, columns).items():
        generator, shape = torch.Generator().manual_seed(rows + columns), grid.empty_shape()
        if grid.dtype.is_floating_point:
            stored[name] = torch.randn(shape, generator=generator, dtype=grid.dtype)
        else:
            limits = torch.iinfo(grid.dtype)
            stored[name] = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(grid.dtype)
    return list(stored.values()), book.decode(stored, columns, torch.float64)


def _packed(stored: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    first, *others = (layout.pack(codes).to(device) for codes in stored)
    return first, others[0] if others else None


def _e8p(codebook: str, shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Random codes of a codebook with any number of stages: the weight, and its arguments of the kernels."""
    stored, weight = _stages(codebook, *shape)
    first, second = _packed(stored, device)
    return weight, (first, shape[1], second, codebooks.get(codebook).residual_scale or 0.0)


def _products(
    device: torch.device,
    multiply: Callable[..., torch.Tensor],
    form: str,
    cases: Sequence[tuple[str, tuple[int, int], int, int, float]],
) -> None:
    """Compare the products of a kernel with vectors.

    Args:
        multiply: from x [M, n], its precision, and the arguments of the kernels to parts [P, M, m] of the product.
        form: of x, for messages.
        cases: a codebook, rows and columns, the number of vectors, their precision, and the largest error.
    """
    for codebook, shape, vectors, precision, most in cases:
        weight, stages = _e8p(codebook, shape, device)
        x = _random(vectors, shape[1])
        y = multiply(x.to(device), precision, *stages)
        said = f"{codebook} times {vectors} vectors in {precision} {form}, {list(shape)}"
        _compare(y.float().sum(0), x.double() @ weight.T, most, said)


def _matvec(device: torch.device) -> None:
    from quip_kernels.gpu import matvec, quantize

    def multiply(x: torch.Tensor, digits: int, *stages: Any) -> torch.Tensor:
        return matvec.matvec(quantize.quantize(x, digits), *stages)

    cases = (
        ("e8p", _EVEN, 1, 2, 2e-4),
        ("e8p", _EVEN, 1, 1, 2e-2),
        ("e8p", _EVEN, 1, 3, 3e-6),
        ("e8p", _UNEVEN, 2, 2, 2e-4),
        ("e8p-rvq3", _EVEN, 1, 2, 2e-4),
        ("e8p-rvq4", _EVEN, 1, 2, 2e-4),
    )
    _products(device, multiply, "digits", cases)


def _small_batch(device: torch.device) -> None:
    from quip_kernels.gpu import small_batch

    def multiply(x: torch.Tensor, terms: int, *stages: Any) -> torch.Tensor:
        return small_batch.small_batch(small_batch.halves(x, terms), *stages)

    cases = (
        ("e8p", _EVEN, 33, 1, 1e-3),
        ("e8p", _UNEVEN, 5, 2, 3e-6),
        ("e8p-rvq3", _EVEN, 5, 1, 1e-3),
        ("e8p-rvq4", _EVEN, 5, 1, 1e-3),
    )
    _products(device, multiply, "halves", cases)


def _dequantize(device: torch.device) -> None:
    from quip_kernels.gpu import dequantize

    cases = [("e8p", _EVEN, dtype) for dtype in ERROR]
    cases += [
        ("e8p", _UNEVEN, torch.float16),
        ("e8p-rvq3", _EVEN, torch.bfloat16),
        ("e8p-rvq4", _EVEN, torch.float16),
    ]
    for codebook, shape, dtype in cases:
        weight, (first, columns, second, scale) = _e8p(codebook, shape, device)
        found = dequantize.dequantize(first, columns, dtype, second, scale)
        _compare(found, weight, ERROR[dtype], f"{codebook} decoded to {dtype}, {list(shape)}")


def _trellis(device: torch.device) -> None:
    from quip_kernels.gpu import trellis

    for index, codebook in enumerate(_CODES):
        book: Any = codebooks.get(codebook)
        stored, weight = _stages(codebook, *_TRELLIS)
        codes, *tables = (tensor.to(device) for tensor in stored)
        code = (book.code, book.k, book.order, tables[0] if tables else None)
        for dtype in list(ERROR)[index % 3 : index % 3 + 1] if index else ERROR:
            found = trellis.dequantize(codes, _TRELLIS[1], dtype, *code)
            _compare(found, weight, ERROR[dtype], f"{codebook} decoded to {dtype}, {list(_TRELLIS)}")
        for vectors in (1,) if index else (1, 5):
            x = _random(vectors, _TRELLIS[1])
            y = trellis.matvec(x.to(device), codes, *code)
            # tables are read in float16
            most = 1e-3 if tables else 3e-6
            _compare(y.float().sum(0), x.double() @ weight.T, most, f"{codebook} times {vectors} vectors, {list(_TRELLIS)}")


def _grouped(device: torch.device) -> None:
    from quip_kernels.gpu import grouped as kernels
    from quip_kernels.gpu import small_batch
    from quip_kernels.gpu import transform as transforms

    experts, vectors = len(_ENDS), _ENDS[-1] + 2
    which = torch.searchsorted(torch.tensor(_ENDS), torch.arange(vectors), right=True)
    cases = (
        ("e8p", _EVEN, 1),
        ("e8p", _UNEVEN, 2),
        ("e8p-rvq3", _EVEN, 1),
        ("e8p-rvq4", _EVEN, 1),
    )
    for codebook, (rows, columns), terms in cases:
        # the codes of all experts are those of one tall weight
        stored, weight = _stages(codebook, experts * rows, columns)
        first, *others = (tensor.view(experts, rows, -1).to(device) for tensor in stored)
        second, scale = others[0] if others else None, codebooks.get(codebook).residual_scale or 0.0
        weights = torch.cat([weight.view(experts, rows, columns), torch.zeros(1, rows, columns, dtype=torch.float64)])
        width = -(-columns // kernels.ALIGNMENT) * kernels.ALIGNMENT
        x = _random(vectors, columns)
        halves = small_batch.halves(x.to(device), terms, width=width)
        y = kernels.grouped(halves, torch.tensor(_ENDS, device=device), first, second, scale)
        said = f"experts of codebook {codebook}, {terms} terms, {[experts, rows, columns]}"
        _compare(y.float().sum(0), torch.einsum("trn,tn->tr", weights[which], x.double()), (1e-3, 3e-6)[terms - 1], said)
    size = _TRANSFORMS[0][0]
    q = incoherence.get("hadamard", size, 0)
    plan = transforms.make_plan(size, q.dense_factors or (), device)
    x, vectors_of = _random(vectors, size), _random(experts + 1, size, seed=2)
    options = {"pre": vectors_of.to(device), "post": vectors_of.to(device), "which": which.to(device)}
    found = transforms.transform(x.to(device), plan, True, torch.float32, **options)
    wanted = q.apply_transpose(x.double() * vectors_of[which]) * vectors_of[which]
    _compare(found, wanted, 3e-6, f"transforms of {size} numbers with a vector for each expert")


def encode(encoder: Encoder, device: torch.device) -> None:
    """As [`check`], for an encoder."""
    if encoder is Encoder.TRELLIS:
        _paths(device)
    elif encoder is Encoder.POINTS:
        _points(device)
    else:
        _panel(encoder.value.rpartition(" ")[2], device)


def _paths(device: torch.device) -> None:
    from quip_kernels.gpu import launch
    from quip_kernels.gpu import viterbi as kernels

    bits, steps = (6, 8) if launch.interpreted() else (16, 32)  # the interpreter is slow, and has no compiler to test
    for weights, fresh in ((1, (2, 2)), (1, (2, 3)), (2, (4, 4))):
        generator = torch.Generator().manual_seed(weights)
        levels = torch.randint(-3000, 3000, (weights, 1 << bits), generator=generator).to(torch.int16)
        tiles = torch.randint(-3000, 3000, (2, steps, weights), generator=generator).to(torch.int16)
        arguments = (fresh, 4, steps, 2)
        wanted = viterbi.search(tiles, levels, *arguments)
        found = kernels.search(tiles.to(device), levels.to(device), *arguments).cpu()
        if not torch.equal(found, wanted):
            differing = (found != wanted).double().mean().item()
            raise ArithmeticError(f"paths with {fresh} new bits: {differing:.1%} of their states are others")


def _points(device: torch.device) -> None:
    """The nearest points of E8P: with the least distances, and those that the codes name."""
    from quip_kernels.gpu import nearest as kernels

    x = _random(50, 8)
    codes, points = (found.cpu() for found in kernels.encode(x.to(device)))
    _compare_points(codebooks.get("e8p"), codes[:, None], points, x, "e8p")


def _panel(codebook: str, device: torch.device) -> None:
    """As [`_points`], for two blocks of columns with feedback from the second to the first."""
    from quip_kernels.gpu import nearest as kernels

    book: Any = codebooks.get(codebook)
    target, base, feedback = _random(50, 16), _random(50, 16, seed=2), _random(16, 16, seed=3) / 8
    panel = (target.to(device), base.to(device), feedback.to(device))
    if codebook == "scalar3":
        results = kernels.round_scalar_panel(*panel, 7)
    elif book.residual_scale is None:
        results = kernels.round_panel(*panel)
    else:
        results = kernels.round_panel(*panel, book.second.name, book.residual_scale)
    codes, points, delta = (found.cpu() for found in results)
    if not torch.equal(delta, base - points):
        raise ArithmeticError(f"a panel of codebook {codebook}: its errors are not those of its points")
    size = book.block_size
    earlier = feedback.double() * (torch.arange(16)[:, None] // size > torch.arange(16) // size)
    wanted = target + (delta.double() @ earlier).float()
    _compare_points(book, codes, points, wanted, f"a panel of codebook {codebook}")


def _compare_points(book: Any, codes: torch.Tensor, points: torch.Tensor, x: torch.Tensor, said: str) -> None:
    """Raise `ArithmeticError` unless codes name the points, and those are as near to x as the CPU finds."""
    _compare(points, book.decode(book.store(codes), x.shape[1], torch.float64), 1e-6, f"points of the codes of {said}")
    nearest = book.from_blocks(book.encode(book.to_blocks(x))[1])
    found, least = ((near.double() - x).square() for near in (points, nearest))
    # of two points at nearly the same distance, either may be found
    farther = (found.view(len(x), -1, book.block_size).sum(2) - least.view(len(x), -1, book.block_size).sum(2)).max().item()
    # a second stage refines whatever the first has found
    most = 0.02 if book.residual_scale else 1e-5
    if not farther <= most:
        raise ArithmeticError(f"{said}: a point is farther away than the nearest one, by {farther:.2g}")


_CHECKS: dict[Family, Callable[[torch.device], None]] = {
    Family.TRANSFORM: _transform,
    Family.MATVEC: _matvec,
    Family.SMALL_BATCH: _small_batch,
    Family.DEQUANTIZE: _dequantize,
    Family.TRELLIS: _trellis,
    Family.GROUPED: _grouped,
}


def _random(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _compare(found: torch.Tensor, wanted: torch.Tensor, most: float, said: str) -> None:
    """Raise `ArithmeticError` for a relative error above `most`, or one that is not a number."""
    error = ((found.double().cpu() - wanted).norm() / wanted.norm()).item()
    if not error <= most:
        raise ArithmeticError(f"{said}: relative error {error:.2g}, at most {most:.2g} was expected")


def whole_layer(device: torch.device, linear: Callable[..., torch.Tensor]) -> None:
    """Compare whole layers, with transforms, of every route; see [`check`]. `linear` is the op on this device."""
    for codebook in ("e8p", "trellis:mul1:k2:exl3"):
        rows, columns = 96, 288
        stored, weight = _stages(codebook, rows, columns)
        su, sv = _random(1, columns, seed=3)[0], _random(1, rows, seed=4)[0]
        q_in, q_out = incoherence.get("hadamard", columns, 0), incoherence.get("hadamard", rows, 0)
        dtype = torch.bfloat16
        x, su, sv = _random(65, columns).to(dtype), su.to(dtype), sv.to(dtype)
        wanted = q_out.apply(q_in.apply_transpose(x.double() * su.double()) @ weight.T) * sv.double()
        packed = [tensor.to(device) for tensor in stored]
        layer = Layer(packed, su.to(device), sv.to(device), None, codebook, "hadamard", "hadamard", 0)
        for vectors in (1, 5, 65):
            said = f"a layer of codebook {codebook} in {dtype}, {vectors} vectors"
            _compare(linear(x[:vectors].to(device), *layer), wanted[:vectors], 2 * ERROR[dtype], said)
