"""The native format: which tensors a saved model holds, checked before any of them is used.

For every quantized linear and embedding a checkpoint holds the tensors of its codebook (`Codebook.tensors`: `codes`, and
others where it has them), `su`, `sv` and the `bias` if there is one, under the module's name. `config.json` lists those
names. The experts of a mixture hold the same stacked for each of their projections, with the projection's name and an
underscore in front (`experts.down_proj_codes`); `config.json` lists `experts.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..nn.embedding import QuipEmbedding
from ..nn.experts import QuipExperts
from ..nn.linear import QuipLinear
from .headers import DAMAGED, TensorInfo, type_name

_FLOATING = ("F16", "BF16", "F32", "F64")


def check_kind(files: Iterable[str]) -> None:
    """Raise `ValueError` for a file that is not of the one kind that native checkpoints have."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not a safetensors file, and transformers-quip reads no other format")


def check_tensors(
    linears: Mapping[str, QuipLinear | QuipEmbedding | QuipExperts],
    others: Iterable[str],
    headers: Mapping[str, TensorInfo],
) -> None:
    """Check that a checkpoint holds every tensor of every quantized linear, in the right shape and type.

    Parameters whose size is known only to the file (`Grid.shape`) get the size that they have there.

    Args:
        linears: the model's quantized modules by name (`nn.replace.quantized_modules`).
        others: names of the model's dense ones.
        headers: the checkpoint's tensors under the names that they have in the model.

    Raises:
        ValueError: with all that is wrong, the first few by name.
    """
    problems = []
    for name, module in linears.items():
        parameters = dict(module.named_parameters())
        infos = {key: headers[f"{name}.{key}"] for key in parameters if f"{name}.{key}" in headers}
        if not isinstance(module, QuipExperts):  # stacks have known sizes
            module.resize_stored({key: info.shape for key, info in infos.items()})
        for key, parameter in module.named_parameters():
            info = infos.get(key)
            if info is None:
                problems.append(f"{name}.{key} is missing")
                continue
            if info.shape != tuple(parameter.shape):
                problems.append(f"{name}.{key} has shape {list(info.shape)} instead of {list(parameter.shape)}")
            allowed = _FLOATING if parameter.is_floating_point() else (str(type_name(parameter.dtype)),)
            if info.dtype not in allowed:
                problems.append(f"{name}.{key} has type {info.dtype} instead of {' or '.join(allowed)}")
    problems += [
        f"{name}.codes exists, but config.json does not list {name} among its quantized_modules"
        for name in others
        if f"{name}.codes" in headers
    ]
    if problems:
        raise ValueError(
            f"The quantized checkpoint does not fit the model: {'; '.join(problems[:4])}"
            f"{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}: {DAMAGED}."
        )


def check_sources(names: Mapping[str, str], headers: Mapping[str, TensorInfo]) -> list[str]:
    """Check that a dense checkpoint holds the weights that are going to be quantized.

    A module of which the checkpoint has nothing is new, where it is not one of a series of blocks: a pooler or a head that
    the base model's checkpoint has no weights for, and that Transformers initialises at random.

    Args:
        names: of the modules and stacks to quantize → the tensor that holds the weight of each.
        headers: as for [`check_tensors`].

    Returns:
        The names of the new modules.

    Raises:
        ValueError: a weight is missing that is not new, or all are; the message lists the names that are there instead.
    """
    missing = [name for name, weight in names.items() if weight not in headers]
    new = [
        name
        for name in missing
        if not re.search(r"\.\d+\.", name) and not any(key.startswith(f"{name}.") for key in headers)
    ]
    if len(missing) == len(new) < len(names):
        return new
    missing = [name for name in missing if name not in new] or missing
    there = sorted(key for key in headers if key.startswith((missing[0] + ".", missing[0] + "_")))[:4]
    found = f"it has {', '.join(there)} instead" if there else "it has nothing of that name"
    raise ValueError(
        f"The checkpoint has no {names[missing[0]]} to quantize ({len(missing)} of {len(names)} such weights are "
        f"missing; {found}). If it was quantized by another method, start from the original, unquantized model."
    )
