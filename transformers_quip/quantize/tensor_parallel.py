"""Transforms for N devices that will share each layer (`QuipConfig(tensor_parallel=N)`): N blocks on the divided side.

Transformers' plan for tensor parallelism says which linears are divided by outputs and which by inputs. Each gets N blocks
on that side, and keeps the transform of all numbers on the other. Linears whose outputs are gathered, experts and linears
that the plan does not name gain nothing from blocks, and keep the usual transform.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import codebooks, incoherence
from ..config.bits import mixed_bits
from ..config.patterns import matches
from .plan import QuantizationPlan

if TYPE_CHECKING:
    from ..config import QuipConfig

# Styles of the plan whose results stay divided by outputs, and the beginning of those that divide inputs.
_OUTPUTS, _INPUTS = "colwise", "rowwise"


def settle_transforms(model: nn.Module, config: QuipConfig, plan: QuantizationPlan) -> QuipConfig:
    """Choose the transforms of each divided linear, for `config.tensor_parallel`.

    Args:
        model: of Transformers, dense; it is not changed, and only its plan is read.
        config: it is not changed.
        plan: the modules to quantize.

    Returns:
        A copy of `config` whose `modules` names the transforms, before the patterns of the caller, which still hold; or
        `config` itself without this option. Modules for which the caller sets `incoherence` are left out, so a second call
        changes nothing.

    Raises:
        ValueError: the model has no such plan, or a linear cannot be divided into N blocks.
    """
    count = config.tensor_parallel
    if count is None:
        return config
    rules: dict[str, str] = getattr(model, "tp_plan", None) or {}
    divided: dict[str, list[str]] = {}
    errors: dict[str, str] = {}
    for entry in plan.entries:
        rule = re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name)
        style = rules.get(rule, "")
        if not (entry.quantized and entry.linear and (style == _OUTPUTS or style.startswith(_INPUTS))):
            continue
        names = divided.setdefault(rule, [])
        if "incoherence" not in config.options_of(entry.name):
            names.append(entry.name)
            if error := _why_not(config.for_module(entry.name), entry.shape, style == _OUTPUTS, count):
                errors.setdefault(rule, f"{entry.name} {error}")
    if not divided:
        raise ValueError(
            f"tensor_parallel={count}: Transformers does not say which linears of {type(model).__name__} are divided by "
            "outputs and which by inputs (it has no tp_plan for them). Leave the option out, or name the transforms in "
            f"modules={{PATTERN: {{'incoherence': ['hadamard', 'hadamard/{count}']}}}}, the input side first"
        )
    if errors:
        patterns = ", ".join(f"{rule.rpartition('.')[2]!r}: {{'incoherence': 'hadamard'}}" for rule in errors)
        raise ValueError(
            f"tensor_parallel={count}: {'; '.join(errors.values())}. Choose another number, or give them the usual "
            f"transform, with more traffic between devices: modules={{{patterns}}}"
        )
    modules: dict[str, dict[str, Any]] = {}
    for rule, names in divided.items():
        part = f"hadamard/{count}"
        sides = ["hadamard", part] if rules[rule] == _OUTPUTS else [part, "hadamard"]
        # the rule is a pattern of `modules` as it stands, if it means these linears alone
        alone = names == [name for name in plan.names if matches(name, rule)]
        modules.update({name: {"incoherence": list(sides)} for name in ([rule] if alone and names else names)})
    return config.with_modules(modules)


def _why_not(config: QuipConfig, shape: tuple[int, ...], by_outputs: bool, count: int) -> str:
    """The reason why a linear cannot be divided into this number of blocks; "" if it can."""
    if config.is_mixed:  # every choice codes the same rows and columns together
        book = codebooks.get(codebooks.default_for_bits(mixed_bits(config.bits, config.codebook)[0], config.codebook))
    else:
        book = codebooks.get(config.codebook_spec)
    size, side = (shape[0], "outputs") if by_outputs else (shape[1], "inputs")
    together = book.rows_together if by_outputs else book.columns_together
    if size % count:
        return f"has {size} {side}, which {count} does not divide"
    if size // count % together:
        return f"has {size} {side}, {size // count} for each of {count} devices, and its codebook codes {together} together"
    try:
        incoherence.get(f"hadamard/{count}", size, config.seed)
    except ValueError as error:
        return f"has {size} {side}: {error}"
    return ""
