"""A quantized model while it is tuned: the codes are fixed, su, sv and norms are trained, on request dense weights too.

su and sv are the outermost factors of a quantized linear, so tuning them needs no transform. Let W be the linear's
current dense weight. Then multipliers a of sv and b of su give

    y = a ⊙ ( W ( b ⊙ x ) ) + bias

exactly, and one plain matrix product computes it. Multipliers begin at 1, so one learning rate fits all layers whatever the
size of their sv. Afterwards su ⊙ b and sv ⊙ a take the places of su and sv; the codes are not used.

The weight of a norm and su of the linears that read its output have the same effect. So the norm is trained and su is
fixed. Linears that read one input share one b, so that their su stay equal, and kernels transform that input once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn import QuipEmbedding, QuipLinear
from ..nn.replace import DenseLinear, dense_weight
from .product import DecodedProduct, FrozenProduct, product_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TunedLinear(nn.Module):
    """y = a ⊙ (W (b ⊙ x)) + bias with W frozen.

    Args:
        quantized: the linear that it replaces; kept, so that the trained values can be merged into it.
        b: multipliers of the inputs [n], shared with other linears, or None.
        keep: whether the decoded W is kept; otherwise it is decoded in each forward and each backward pass.
    """

    def __init__(self, quantized: QuipLinear, b: nn.Parameter | None, keep: bool = True):
        super().__init__()
        self._quantized = (quantized,)  # in a tuple it is not a part of this module
        device = quantized.su.device
        self.in_features, self.out_features = quantized.in_features, quantized.out_features
        self.weight = nn.Parameter(self._decoded(), requires_grad=False) if keep else None
        self.a = nn.Parameter(torch.ones(quantized.out_features, device=device))
        self.b = b
        self.bias = quantized.bias

    @property
    def base_layer(self) -> QuipLinear:
        """The linear that it replaces, under PEFT's name for a wrapped module."""
        return self._quantized[0]

    def _decoded(self) -> torch.Tensor:
        return self.base_layer.dequantize(torch.float32).to(product_dtype(self.base_layer.su.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype."""
        if self.b is not None:
            x = x * self.b.to(x.dtype)
        y = DecodedProduct.apply(x, self._decoded) if self.weight is None else FrozenProduct.apply(x, self.weight)
        y = y * self.a.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TrainedLinear(nn.Module):
    """y = W x + bias with W trained in float32; the products are computed in the fastest type of the device.

    Args:
        dense: the linear (`nn.Linear` or `Conv1D`) that it replaces; kept, so that the trained weight can be stored in it.
        copy: whether W is a copy in float32; otherwise it is the weight of `dense` (`nn.Linear`) itself, which may be tied.
    """

    def __init__(self, dense: DenseLinear, copy: bool = True):
        super().__init__()
        self._dense = (dense,)  # in a tuple it is not a part of this module
        weight = dense_weight(dense).detach()
        own = dense.get_parameter("weight")
        self.weight = nn.Parameter(weight.to(torch.float32, copy=True)) if copy else own
        self.bias: nn.Parameter | None = dense.bias
        self._dtype = product_dtype(weight.device)

    @property
    def base_layer(self) -> DenseLinear:
        """The linear that it replaces."""
        return self._dense[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Floating point [..., n] → [..., m] in the same dtype."""
        y = nn.functional.linear(x.to(self._dtype), self.weight.to(self._dtype)).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass
class Student:
    """The parts of a model that are trained.

    Attributes:
        linears: by name, those that stand in for quantized ones.
        norms: by name, one-dimensional parameters of the model that are trained as they are.
        scales: by name of such a parameter, the size of its entries: the factor of its learning rate relative to a
            multiplier's.
        dense: by name, those that stand in for dense linears, whose weights are trained.
        embeddings: by name, the weights of embeddings that are trained as they are.
    """

    linears: dict[str, TunedLinear]
    norms: dict[str, nn.Parameter]
    scales: dict[str, float]
    dense: dict[str, TrainedLinear] = field(default_factory=dict)
    embeddings: dict[str, nn.Parameter] = field(default_factory=dict)
    _originals: dict[str, torch.Tensor] = field(default_factory=dict)

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained, once, by a name that is the same in every run."""
        result, seen = {}, set()
        for name, linear in self.linears.items():
            for kind, value in (("a", linear.a), ("b", linear.b)):
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    result[f"{name}.{kind}"] = value
        return result | self.norms | self._weights() | self.embeddings

    def _weights(self) -> dict[str, nn.Parameter]:
        return {f"{name}.weight": linear.weight for name, linear in self.dense.items()}

    def groups(self, learning_rate: float, weights: float = 0.0, embedding_rate: float = 0.0) -> list[dict]:
        """Parameter groups for an optimizer, with the learning rate that suits the size of each.

        Args:
            learning_rate: of multipliers.
            weights: of dense weights.
            embedding_rate: of embeddings, as a share of `learning_rate`.
        """
        others = self.norms | self._weights() | self.embeddings
        multipliers = [value for name, value in self.trained().items() if name not in others]
        result = [{"params": multipliers, "lr": learning_rate}] if multipliers else []
        rates = dict.fromkeys(self.norms, learning_rate) | dict.fromkeys(self.embeddings, learning_rate * embedding_rate)
        known = self.norms | self.embeddings
        result += [{"params": [known[name]], "lr": rate * self.scales[name]} for name, rate in rates.items()]
        return result + ([{"params": list(self._weights().values()), "lr": weights}] if self.dense else [])

    @torch.no_grad()
    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the trained parameters."""
        return {name: value.detach().clone() for name, value in self.trained().items()}

    @torch.no_grad()
    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Restore a [`snapshot`]."""
        for name, parameter in self.trained().items():
            parameter.copy_(values[name])


def tuned(
    model: PreTrainedModel, ids: torch.Tensor, norms: bool = True, keep: bool = True, embeddings: bool = False
) -> AbstractContextManager[Student]:
    """[`tuned_module`] of a whole model.

    Args:
        model: with quantized linears.
        ids: token ids [B, T], a few, for one forward.
        norms, keep: see [`tuned_module`].
        embeddings: whether the embeddings and the output embeddings are trained as well.

    Raises:
        ValueError: see [`tuned_module`] and [`embedding_weights`].
    """
    found = embedding_weights(model) if embeddings else {}
    return tuned_module(model, partial(model, input_ids=ids, use_cache=False), norms, keep=keep, embeddings=found)


def embedding_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of the embeddings and of the output embeddings by name; tied ones once.

    Raises:
        ValueError: one of them is quantized, or is not an `nn.Embedding` or `nn.Linear`.
    """
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in wanted:
        if isinstance(module, (QuipEmbedding, QuipLinear)) or not isinstance(module, (nn.Embedding, nn.Linear)):
            raise ValueError(f"embeddings can only be trained while they are dense, and one is a {type(module).__name__}")
    weights = {id(module.weight) for module in wanted}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in weights}


@contextmanager
def tuned_module(
    module: nn.Module,
    run: Callable[[], Any],
    norms: bool = True,
    dense: Iterable[str] = (),
    keep: bool = True,
    embeddings: Mapping[str, nn.Parameter] | None = None,
) -> Iterator[Student]:
    """A context in which the quantized linears of a module are replaced by trainable stand-ins; afterwards they are back.

    At the end, the trained values are merged into su, sv and the norms, and stored in the dense linears. After an error the
    module is as it was.

    Args:
        module: a model, or a block of one, with quantized linears.
        run: runs it once: that finds out which linears read one input, and which a norm's output.
        norms: whether the weights of norms, and the biases of quantized linears, are trained as well.
        dense: names of dense linears, whose weights are trained as well.
        keep: whether the decoded weights of all quantized linears are in memory at once; see [`TunedLinear`].
        embeddings: further parameters of the module, by name, that are trained as they are.

    Raises:
        ValueError: the module has no quantized linears.
    """
    quantized = {name: inner for name, inner in module.named_modules() if isinstance(inner, QuipLinear)}
    if not quantized:
        raise ValueError(f"{type(module).__name__} has no quantized linears, so it cannot be tuned")
    readers = _readers(module, quantized, run)
    frozen = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    linears = {name: TunedLinear(inner, readers.multipliers[name], keep) for name, inner in quantized.items()}
    trained = {name: TrainedLinear(module.get_submodule(name)) for name in dense}
    for name, stand_in in (linears | trained).items():
        module.set_submodule(name, stand_in)
    student = Student(linears, {}, {}, trained)
    try:
        if norms:
            _train_norms(module, readers.norms, student)
        for name, parameter in (embeddings or {}).items():
            _train(name, parameter, 0.0, student, student.embeddings)
        yield student
    except BaseException:
        _restore(module, student, merge=False)
        raise
    else:
        _restore(module, student, merge=True)
    finally:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen.get(name, False))
            parameter.grad = None


@dataclass
class _Readers:
    multipliers: dict[str, nn.Parameter | None]  # of the inputs of each linear
    norms: list[tuple[str, nn.Module]]


@torch.no_grad()
def _readers(model: nn.Module, quantized: dict[str, QuipLinear], run: Callable[[], Any]) -> _Readers:
    """Which linears read one tensor, and which of these tensors a norm has written."""
    norms = [(name, module) for name, module in model.named_modules() if _is_norm(module)]
    held: list[torch.Tensor] = []  # kept alive, so that equal identity means the same tensor
    written: set[int] = set()
    read: dict[str, int] = {}
    hooks = []

    def note_output(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        if isinstance(output, torch.Tensor):
            held.append(output)
            written.add(id(output))

    def reader(name: str):
        def note_input(_: nn.Module, arguments: tuple, keywords: dict) -> None:
            x = arguments[0] if arguments else next(iter(keywords.values()))
            held.append(x)
            read.setdefault(name, id(x))

        return note_input

    try:
        hooks += [module.register_forward_hook(note_output) for _, module in norms]
        hooks += [m.register_forward_pre_hook(reader(n), with_kwargs=True) for n, m in quantized.items()]
        run()
    finally:
        for hook in hooks:
            hook.remove()
    multipliers: dict[str, nn.Parameter | None] = {}
    leaders: dict[int, list[str]] = {}
    for name, module in quantized.items():
        source = read.get(name)
        if source is not None and source in written:
            multipliers[name] = None
            continue
        alike = [other for other in leaders.get(source or 0, []) if _same_su(quantized[other], module)] if source else []
        multipliers[name] = multipliers[alike[0]] if alike else _ones(module)
        if source:
            leaders.setdefault(source, []).append(name)
    return _Readers(multipliers, norms)


def _ones(module: QuipLinear) -> nn.Parameter:
    return nn.Parameter(torch.ones(module.in_features, device=module.su.device))


def _same_su(first: QuipLinear, second: QuipLinear) -> bool:
    return torch.equal(first.su, second.su)


def _is_norm(module: nn.Module) -> bool:
    """Whether this is a norm over the last dimension: with a weight [n] and maybe a bias [n]."""
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if weight is None or weight.ndim != 1 or not weight.is_floating_point() or not set(own) <= {"weight", "bias"}:
        return False
    return "norm" in type(module).__name__.lower()


def _train_norms(model: nn.Module, norms: list[tuple[str, nn.Module]], student: Student) -> None:
    """Make the weights and biases of norms, and the biases of quantized linears, float32 parameters that are trained."""
    for prefix, module in norms:
        for name, parameter in module.named_parameters(recurse=False):
            offset = 1.0 if name == "weight" and _adds_one(module) else 0.0
            _train(f"{prefix}.{name}", parameter, offset, student, student.norms)
    for prefix, linear in student.linears.items():
        if linear.bias is not None:
            _train(f"{prefix}.bias", linear.bias, 0.0, student, student.norms)


def _train(name: str, parameter: nn.Parameter, offset: float, student: Student, kind: dict[str, nn.Parameter]) -> None:
    size = (parameter.detach().float() + offset).square().mean().sqrt().item()
    if size == 0:
        return  # the right size of its entries is unknown
    student._originals[name] = parameter.data
    parameter.data = parameter.data.to(torch.float32, copy=True)
    parameter.requires_grad_(True)
    kind[name] = parameter
    student.scales[name] = size


@torch.no_grad()
def _adds_one(module: nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight (Gemma's), so that a weight of zeros does not silence it."""
    weight = module.get_parameter("weight")
    before = weight.data
    weight.data = torch.zeros_like(before)
    try:
        x = torch.linspace(-1, 1, before.numel(), dtype=before.dtype, device=before.device)
        y = module(x[None])
        bias = getattr(module, "bias", None)
        return bool((y if bias is None else y - bias).abs().sum() > 0)
    finally:
        weight.data = before


@torch.no_grad()
def _restore(module: nn.Module, student: Student, merge: bool) -> None:
    """Put the linears back, with the trained values merged into them, or with everything as it was."""
    for name, stand_in in (student.linears | student.dense).items():
        module.set_submodule(name, stand_in.base_layer)
    for name, parameter in (student.norms | student.embeddings).items():
        before = student._originals[name]
        parameter.data = parameter.data.to(before.dtype) if merge else before
    if not merge:
        return
    for linear in student.linears.values():
        _multiply(linear.base_layer.sv, linear.a)
        if linear.b is not None:
            _multiply(linear.base_layer.su, linear.b)
    for trained in student.dense.values():
        dense_weight(trained.base_layer).copy_(trained.weight)


def _multiply(vector: nn.Parameter, factors: torch.Tensor) -> None:
    """Scale the first entries of su or sv, which may be longer if a linear is padded; rounded once to its dtype."""
    part = vector.data[: len(factors)]
    part.copy_(part.float() * factors)
