"""A model whose weights stay in the files of its checkpoint: one block at a time is read, and its result is written.

Transformers' own converters turn the tensors of a block into its parameters, so a model has the same values
as after `from_pretrained`, whatever its files look like.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from ..calibration import CapturedInputs, processes
from ..calibration.block_writer import BlockWriter
from ..calibration.hidden import MappedInputs
from ..checkpoints.complete import check_shapes, not_given
from ..checkpoints.files import Files
from ..checkpoints.headers import DAMAGED
from ..checkpoints.memory import return_memory
from ..config import QuipConfig
from ..memory import free_memory
from ..nn import replace
from ..quantize.residence import Residence
from ..quantize.state import GRADIENTS, RunState
from .loader import names_in_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Tensors outside of all parts, which are always in memory.
_OUTSIDE = ""


class StreamedWeights(Residence):
    """The residence of a model that is larger than memory.

    Args:
        model: dense, on the meta device.
        paths: the checkpoint's files of weights.
        parts: prefixes of the parts that are read one at a time.
        config: how the model is quantized, for the parts that an earlier run has finished.
        state: of the run; None where nothing is written.
        device: where the weights are put.

    Raises:
        ValueError: a tensor is missing, or has another shape than the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        paths: Sequence[str],
        parts: Sequence[str],
        config: QuipConfig,
        state: RunState,
        device: torch.device | str = "cpu",
    ):
        self.model, self.parts, self.config, self.state = model, tuple(parts), config, state
        self.device = torch.device(device)
        self.shared, self.quiet = processes.count() > 1, not processes.is_first()
        self._files, self._paths = Files(paths), list(paths)
        self._rules = get_model_conversion_mapping(model)
        self._held: set[str] = set()
        self._views: set[str] = set()  # parts in memory that are views of files, which take no memory
        self._placed: set[str] = set()  # parts whose quantized modules are in the model
        tensors = model.state_dict(keep_vars=True)
        owners: dict[int, list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            owners[id(tensor)].append(name)
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        shared = {name for names in owners.values() if len(names) > 1 for name in names} | {*tied, *tied.values()}
        self._part_of = {name: _OUTSIDE if name in shared else self._find_part(name) for name in tensors}
        self._keys: dict[str, list[str]] = defaultdict(list)
        names = names_in_model(model, self._files.headers, self._rules, whole=True)
        check_shapes(model, names)
        missing = not_given(model, names)
        if missing:
            kind = type(model).__name__
            raise ValueError(
                f"The checkpoint has no {missing[0]} ({len(missing)} weights of {kind} are missing): {DAMAGED}"
            )
        self._sort_keys()

    def _sort_keys(self) -> None:
        """Find the part of every tensor in the files, and the rules that are used: their inverses serve for saving."""
        rules = copy.deepcopy(self._rules)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        for key in self._files.headers:
            name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, self._part_of)
            if name not in self._part_of and key in self._part_of:
                name = key
            self._keys[self._part_of.get(name, _OUTSIDE)].append(key)
        self._used = [rule for rule in rules if rule.was_used()]

    def _find_part(self, name: str) -> str:
        return next((part for part in self.parts if name.startswith(part)), _OUTSIDE)

    # Reading

    def load_outside(self) -> None:
        """Read all tensors outside of the parts, and compute the buffers that no file has."""
        model: Any = self.model
        self._read(_OUTSIDE, copied=False)
        self._files.unmap()
        model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        for tensor in model.state_dict(keep_vars=True).values():
            tensor._is_hf_initialized = True  # by a file, now or later
        model._initialize_missing_keys(False)
        model.tie_weights(recompute_mapping=False)

    def _read(self, part: str, copied: bool) -> None:
        tensors = {key: self._files.read(self._files.headers[key]) for key in self._keys[part]}
        model: Any = self.model
        dtype = model.dtype
        settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": self.device},
            weight_mapping=copy.deepcopy(self._rules),
        )
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        with _without_bar():
            info = convert_and_load_state_dict_in_model(model, tensors, settings)[0]
        model._weight_conversions = self._used
        if info.conversion_errors or info.mismatched_keys:
            wrong = [*info.conversion_errors, *info.mismatched_keys]
            raise ValueError(f"{wrong[0]} cannot be made from the tensors of the checkpoint: {DAMAGED}")
        views = [place for place in self._tensors(part) if _storage(place) in given] if part else []
        if copied:  # converters have copied the others already
            for kinds, key in views:
                kinds[key] = _like(kinds[key], kinds[key].detach().clone())
            del tensors
            self._files.unmap()
        elif part and len(views) == len(list(self._tensors(part))):
            self._views.add(part)

    def _load(self, part: str, copied: bool) -> None:
        """Bring a part into memory: its result if the model has its quantized modules, else the dense weights."""
        if part not in self._placed:
            self._read(part, copied)
            return
        tensors = self.state.tensors(part)
        if copied:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        elif self.device.type == "cpu":
            self._views.add(part)
        tensors = {name.removeprefix(part): tensor.to(self.device) for name, tensor in tensors.items()}
        self.model.get_submodule(part.removesuffix(".")).load_state_dict(tensors, strict=False, assign=True)

    def _release(self, part: str) -> None:
        self._views.discard(part)
        for kinds, key in self._tensors(part):
            tensor = kinds[key]
            if not tensor.is_meta:
                kinds[key] = _like(tensor, torch.empty_like(tensor, device="meta"))

    def _tensors(self, part: str) -> Iterator[tuple[dict[str, Any], str]]:
        """The tensors of a part that are stored in files: a module's dictionary, and the name in it."""
        root = part.removesuffix(".")
        for path, module in self.model.get_submodule(root).named_modules():
            for kinds in (module._parameters, module._buffers):
                for key, tensor in kinds.items():
                    name = f"{root}.{path}.{key}" if path else f"{root}.{key}"
                    if tensor is None or key in module._non_persistent_buffers_set:
                        continue
                    if self._part_of.get(name, part) == part:
                        yield kinds, key

    # The residence

    def seconds(self) -> dict[str, float]:
        """See [`Residence.seconds`]."""
        return self.state.seconds

    @contextmanager
    def part(self, prefix: str) -> Iterator[None]:
        """See [`Residence.part`]."""
        if prefix in self._held:
            yield
            return
        self._load(prefix, copied=True)
        self._held.add(prefix)
        try:
            yield
        finally:
            self._held.remove(prefix)
            self._release(prefix)
            return_memory(self._paths)

    @contextmanager
    def viewed(self, prefix: str) -> Iterator[None]:
        """As [`part`], for reading alone: where possible the weights are views of their file, and may stay."""
        if prefix not in self._held and prefix not in self._views:
            self._load(prefix, copied=False)
        try:
            yield
        finally:
            if prefix not in self._held and prefix not in self._views:
                self._release(prefix)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """See [`Residence.whole`]: each block is read when it is called, and let go afterwards."""
        open_parts: dict[str, ExitStack] = defaultdict(ExitStack)

        def enter(part: str) -> Callable[..., None]:
            return lambda *_: open_parts[part].enter_context(self.viewed(part))

        def leave(part: str) -> Callable[..., None]:
            return lambda *_: open_parts[part].close()

        with ExitStack() as stack:
            stack.callback(self._release_views)
            for part in self.parts:
                module = self.model.get_submodule(part.removesuffix("."))
                stack.callback(module.register_forward_pre_hook(enter(part), prepend=True).remove)
                stack.callback(module.register_forward_hook(leave(part), always_call=True).remove)
            yield

    def _release_views(self) -> None:
        for part in self._views - self._held:
            self._release(part)
        return_memory(self._paths)

    def fit(self) -> bool:
        """Whether the dense weights fit into half of the free memory of a CPU, so that reading them again costs nothing."""
        if self.device.type != "cpu":
            return False
        size = sum(info.bytes for info in self._files.headers.values())
        return 2 * size <= free_memory(torch.device("cpu"))

    def writer(self) -> BlockWriter:
        """Writes text with one block in memory."""
        return BlockWriter(self.viewed, self.state.folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """See [`Residence.held`]: all parts are in memory, as they are in their files where that is possible."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(self.part(part))
            yield

    def settled(self, settle: Callable[[], QuipConfig]) -> QuipConfig:
        """See [`Residence.settled`]."""
        if self.state.modules is None:
            self.state.settle(processes.from_first(lambda: settle().modules))
        config = copy.copy(self.config)
        config.modules = self.state.modules
        self.config = config
        return config

    def sums(self) -> Path:
        """See [`Residence.sums`]: each process has its own, because each adds up the gradients of all sequences."""
        return self.state.folder / f"{GRADIENTS}-{processes.rank()}"

    def inputs(self, captured: CapturedInputs) -> CapturedInputs:
        """See [`Residence.inputs`]: the hidden states are in files, those of all processes in the same ones."""
        found = processes.gathered([tuple(hidden.shape) for hidden in captured.hidden])
        dealt = _deal(sum(map(len, found)))
        known = {n: shape for numbers, own in zip(dealt, found, strict=True) for n, shape in zip(numbers, own, strict=True)}
        shapes, numbers = [known[number] for number in range(len(known))], dealt[processes.rank()]
        state = self.state
        captured.precision.is_exact |= state.is_exact
        return MappedInputs.of(captured, state.folder, shapes, numbers, state.entering, state.hidden_dtype)

    def batches(self, count: int) -> Sequence[int]:
        """See [`Residence.batches`]: they are dealt out in turn. Raises `ValueError` if there are too few."""
        if count < processes.count():
            raise ValueError(
                f"{count} batches of text cannot be dealt out to {processes.count()} processes: lower batch_size, or start "
                "fewer processes"
            )
        return _deal(count)[processes.rank()]

    def restore(self, prefix: str) -> list[dict[str, Any]] | None:
        """See [`Residence.restore`]."""
        if prefix not in self.state.finished:
            return None
        records = self.state.finished[prefix]
        self._placed.add(prefix)
        shapes = {name: tensor.shape for name, tensor in self.state.tensors(prefix).items()}
        stacks = replace.dense_stacks(self.model)
        experts = dict.fromkeys(record["name"].rpartition(".")[0] for record in records if record["name"] in stacks)
        for name in experts:
            replace.replace_experts(self.model, name, self.config)
        for name in (record["name"] for record in records if record["name"] not in stacks):
            module = replace.replace_by_empty(self.model, name, self.config)
            inside = {key.removeprefix(f"{name}."): shape for key, shape in shapes.items() if key.startswith(f"{name}.")}
            module.resize_stored(inside)
        if prefix not in self.parts:
            for name, tensor in self.state.tensors(prefix).items():
                owner, _, key = name.rpartition(".")
                values = {key: tensor.to(self.device)}
                self.model.get_submodule(owner).load_state_dict(values, strict=False, assign=True)
        return records

    def finish(
        self,
        prefix: str,
        records: Sequence[dict[str, Any]],
        seconds: dict[str, float],
        inputs: CapturedInputs | None = None,
    ) -> None:
        """See [`Residence.finish`]: the part is on the disk when this returns."""
        if prefix in self.parts:
            stored = self.model.get_submodule(prefix.removesuffix(".")).state_dict(prefix=prefix)
            tensors = {name: tensor for name, tensor in stored.items() if self._part_of.get(name, prefix) == prefix}
        else:
            stored = {record["name"]: self.model.get_submodule(record["name"]) for record in records}
            tensors = {
                f"{name}.{key}": value for name, module in stored.items() for key, value in module.state_dict().items()
            }
        after = inputs.next_file() if isinstance(inputs, MappedInputs) else None
        if inputs is not None:
            self.state.is_exact = inputs.precision.is_exact
        self.state.finish(prefix, tensors, records, seconds, after)
        self._placed.add(prefix)
        if isinstance(inputs, MappedInputs):
            inputs.advance_file(delete=processes.is_first())

    @contextmanager
    def results(self) -> Iterator[None]:
        """See [`Residence.results`]."""
        self.load_results(copied=True)
        yield

    def load_results(self, copied: bool = False) -> None:
        """Put the results of all parts into the model, as views of their files unless they are `copied`."""
        for part in self.parts:
            if part not in self._held:
                self._load(part, copied)
                self._held.add(part)
                self._views.discard(part)


def _like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A value as a parameter or a buffer, as the tensor is one."""
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _storage(place: tuple[dict[str, Any], str]) -> int:
    """The address of the memory of a tensor in a module's dictionary."""
    kinds, key = place
    return kinds[key].untyped_storage().data_ptr()


def _deal(count: int) -> list[list[int]]:
    """The numbers of the batches of each process: pairs in turn, because every other batch is replayed (`calibrate_on`)."""
    together = processes.count()
    size = 2 if count >= 2 * together else 1
    return [[number for number in range(count) if number // size % together == rank] for rank in range(together)]


@contextmanager
def _without_bar() -> Iterator[None]:
    """Without Transformers' bar of the tensors that it loads."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
