"""Find the decoder blocks of a model by its structure. Nothing here knows an architecture by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from .device import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNCALIBRATED = "use dataset=None (no calibration)"


def first_argument(block: nn.Module) -> str:
    """The name of the first argument of the block's own forward, whatever hooks replaced it on the instance."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    return parameters[0].name if parameters else ""


def _block_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Every outermost ModuleList whose modules hold linears and are called in the same way."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for outer in found):  # named_modules() yields parents first
            continue
        members = list(module)
        if any(is_linear(member) for member in members):  # a list of heads, not of blocks
            continue
        if any(isinstance(member, nn.ModuleList) for member in members):  # its members are the lists
            continue
        if not any(is_linear(inner) for member in members for inner in member.modules()):
            continue
        if len({first_argument(member) for member in members}) != 1:
            continue
        found[name] = module
    return found


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks of a causal language model, by structure only.

    A candidate is an outermost `nn.ModuleList` whose members hold linears (`nn.Linear` or Transformers' `Conv1D`),
    are not linears themselves, and take the same first argument (hybrid models mix classes with one call form). Lists
    nested in a block, such as experts, are therefore never candidates. Among several, those inside the text decoder
    that Transformers names (`get_decoder()`; so that the vision tower of a multimodal model does not win) come first,
    then the longest.

    Returns:
        (dotted name in `model`, the list).

    Raises:
        ValueError: an encoder-decoder model, or no such list.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; calibration block by block is for decoder-only "
            f"(causal) models. Load a causal model, or {UNCALIBRATED}."
        )
    candidates = _candidates(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    candidates = _inside(candidates, [decoder]) or candidates
    name = max(candidates, key=lambda name: len(candidates[name]))
    return name, candidates[name]


def find_block_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """Every list of blocks to calibrate, in the order in which they run.

    Of an encoder-decoder model these are the lists of the encoder and the decoder. Of any other model they are the list
    that [`find_blocks`] finds and others next to it whose blocks are of the same class: a model may have two stacks of
    layers, or a stack for each resolution.

    Returns:
        The dotted name in `model` → the list.

    Raises:
        ValueError: there is none.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        candidates = _candidates(model)
        halves = [getattr(model, find)() for find in ("get_encoder", "get_decoder") if hasattr(model, find)]
        return _inside(candidates, halves) or candidates
    name, blocks = find_blocks(model)
    classes = {type(block) for block in blocks}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    candidates = _candidates(model)
    candidates = _inside(candidates, [decoder]) or candidates
    return {n: found for n, found in candidates.items() if n == name or classes >= {type(block) for block in found}}


def _inside(lists: dict[str, nn.ModuleList], parents: Iterable[object]) -> dict[str, nn.ModuleList]:
    """Those of these lists that are in one of the parents."""
    inside = {id(module) for parent in parents if isinstance(parent, nn.Module) for module in parent.modules()}
    return {name: blocks for name, blocks in lists.items() if id(blocks) in inside}


def _candidates(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of blocks, without those of parts that read images or sounds, if there are others."""
    candidates = _block_lists(model)
    if not candidates:
        raise ValueError(
            f"No decoder blocks found in {type(model).__name__}: it has no nn.ModuleList whose members hold nn.Linear "
            "or Conv1D layers and are called alike, so it cannot be calibrated block by block; "
            f"{UNCALIBRATED}."
        )
    others = {
        id(inner)
        for module in model.modules()
        if module is not model and getattr(module, "main_input_name", "input_ids") != "input_ids"
        for inner in module.modules()
    }
    return {name: blocks for name, blocks in candidates.items() if id(blocks) not in others} or candidates
