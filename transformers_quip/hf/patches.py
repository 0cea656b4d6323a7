"""Everything that this package replaces inside other packages: one table, and the call that puts all of it back.

Where Transformers (or PyTorch) has no hook, a function is replaced by one that calls it. For models that
this package has not quantized, the replacements behave as the originals.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..nn import collectives
from . import recognise, resizing, saving

logger = logging.getLogger(__name__)

_MARK = "_transformers_quip_replaces"
_ON_IMPORT, _ON_LOADING = "this package is imported", "a quantized model is loaded"


@dataclass(frozen=True)
class Patch:
    """One function that is replaced.

    Attributes:
        module: the module that has it.
        name: in that module; "Class.method" for a method.
        wrap: makes the replacement from the original.
        when: the moment of the replacement.
        why: the reason, in one sentence.
        optional: whether some builds and versions of the module do not have it.
    """

    module: str
    name: str
    wrap: Callable[[Callable], Callable]
    when: str
    why: str
    optional: bool = False

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def owner(self, load: bool) -> Any:
        """The module or class that has the function; None if it does not exist, or is not imported and should not be."""
        try:
            found: Any = importlib.import_module(self.module) if load else sys.modules.get(self.module)
            for part in self.name.split(".")[:-1]:
                found = getattr(found, part)
            return found if not self.optional or hasattr(found, self.attribute) else None
        except (ImportError, AttributeError):
            if self.optional or not load:
                return None
            raise


_MODELS = "transformers.modeling_utils"
TABLE = (
    Patch(
        _MODELS,
        "get_hf_quantizer",
        recognise.get_hf_quantizer,
        _ON_IMPORT,
        "Checkpoints of QuIP#, QTIP and QuIP-for-all may describe their quantization in `quip_params` or in a file "
        "next to config.json, where Transformers does not look: it would return a dense model with random weights.",
    ),
    Patch(
        _MODELS,
        "load_state_dict",
        recognise.load_state_dict,
        _ON_IMPORT,
        "A `.bin` file of such a checkpoint is read as tensors alone, never as code, and is named if it is damaged.",
    ),
    Patch(
        _MODELS,
        "PreTrainedModel.from_pretrained",
        recognise.from_pretrained,
        _ON_IMPORT,
        "Other files of the same model (its tokenizer, for calibration) are read with the same revision, token and folder; "
        "and quantized weights that config.json does not describe are an error instead of a model with random weights.",
    ),
    Patch(
        _MODELS,
        "PreTrainedModel.save_pretrained",
        saving.save_pretrained,
        _ON_LOADING,
        "A quantized model is saved completely or not at all, with a model card, and a dense one without a card that says "
        "it is quantized.",
    ),
    Patch(
        _MODELS,
        "revert_weight_conversion",
        saving.revert_weight_conversion,
        _ON_LOADING,
        "Rules that rename or join a model's dense weights in files also match some codes and scales, which would not be "
        "found again.",
    ),
    Patch(
        _MODELS,
        "PreTrainedModel._upload_modified_files",
        saving.upload_modified_files,
        _ON_LOADING,
        "`push_to_hub` uploads that card instead of an empty form.",
    ),
    Patch(
        _MODELS,
        "PreTrainedModel.resize_token_embeddings",
        resizing.resize_token_embeddings,
        _ON_LOADING,
        "Another number of tokens is refused, before any change, if the head or the table is quantized.",
    ),
    *(
        Patch(
            module,
            "broadcast",
            collectives.single,
            _ON_LOADING,
            "Codes are 16-bit integers, which Gloo and NCCL do not have as a type: their bytes are sent.",
            optional=True,
        )
        for module in ("torch.distributed", "torch.distributed.distributed_c10d")
    ),
    Patch(
        "torch.distributed",
        "_broadcast_coalesced",
        collectives.coalesced,
        _ON_LOADING,
        "The same for DistributedDataParallel, which broadcasts all parameters once.",
        optional=True,
    ),
    Patch(
        "torch.distributed.fsdp",
        "FullyShardedDataParallel.__init__",
        collectives.refusing,
        _ON_LOADING,
        "FSDP1 cannot join integers and floats to one tensor: the error says so, and names FSDP2.",
        optional=True,
    ),
)


@dataclass(frozen=True)
class _Replaced:
    """The mark of a replacement: the object that it replaces, itself, and the function that made it."""

    original: Any
    replacement: Callable
    wrap: Callable


def install_on_import() -> None:
    """Replace the functions that must be in place before a checkpoint is read."""
    for patch in TABLE:
        if patch.when == _ON_IMPORT:
            _install(patch)


def install() -> None:
    """Replace all functions of the table that are not replaced yet."""
    for patch in TABLE:
        _install(patch)


def _install(patch: Patch) -> None:
    owner = patch.owner(load=True)
    if owner is not None:
        wrap_once(owner, patch.attribute, patch.wrap)


def wrap_once(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace a function of a module, or a method of a class, by `wrap` of it; nothing happens the second time.

    The replacement of an earlier import of this package is taken out first. A replacement by another package
    on top of this one is left alone: it still calls the function of this package.

    Args:
        owner: the module or the class.
        name: of the function; a class method stays one.
        wrap: makes the replacement out of the original function.
    """
    current = inspect.getattr_static(owner, name)
    mark = _mark(current)
    if mark is not None and mark.wrap is wrap:
        return
    original = mark.original if mark is not None and mark.replacement is _function(current) else current
    replacement = functools.wraps(_function(original))(wrap(_function(original)))
    setattr(replacement, _MARK, _Replaced(original, replacement, wrap))
    setattr(owner, name, classmethod(replacement) if isinstance(original, classmethod) else replacement)


def restore() -> None:
    """Restore the original functions of Transformers and of `torch.distributed`.

    Loaded models keep working. Checkpoints of other packages that describe themselves where Transformers does not look are
    not recognised any more, and model cards are not written. The next quantized model that is loaded replaces the
    functions again, and so does the next import of this package in another process. Quantization methods stay registered.
    """
    for patch in TABLE:
        owner = patch.owner(load=False)
        if owner is None:
            continue
        current = inspect.getattr_static(owner, patch.attribute)
        mark = _mark(current)
        if mark is None:
            continue
        if mark.replacement is not _function(current):
            logger.warning(
                f"{patch.module}.{patch.name} was not restored: {_function(current).__module__} has replaced it afterwards"
            )
        elif inspect.isclass(owner) and any(vars(base).get(patch.attribute) is mark.original for base in owner.__mro__[1:]):
            delattr(owner, patch.attribute)  # it was inherited
        else:
            setattr(owner, patch.attribute, mark.original)


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, classmethod) else found


def _mark(found: Any) -> Any:
    return getattr(_function(found), _MARK, None)


def markdown_rows() -> Iterator[str]:
    """The table as rows of Markdown, with its head, for the documentation."""
    yield "| function | replaced when | why |"
    yield "|---|---|---|"
    for patch in TABLE:
        yield f"| `{patch.module}.{patch.name}` | {patch.when} | {patch.why} |"
