"""Watch the inputs of a block's linears while the block runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .arguments import without_cache
from .device import move
from .inputs import Batch, input_device, keywords

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reading:
    """One tensor that linears read during one call of the block."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = weakref.ref(tensor)  # a strong reference would keep every input of the block alive
        self._form = self._describe(tensor)
        self.leaders: set[str] = set()

    @staticmethod
    def _describe(tensor: torch.Tensor) -> tuple:
        version = 0 if tensor.is_inference() else tensor._version  # an in-place change makes it another input
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, version

    def is_of(self, tensor: torch.Tensor) -> bool:
        # While the first reader's tensor lives its memory is not reused, so equal form means equal content, even where
        # each linear is given its own view.
        return self._tensor() is not None and self._describe(tensor) == self._form


class Regroup(Exception):
    """A linear reads another input than its group: what was collected for the group is wrong, and has to be again.

    Args:
        name: of the linear, which from now on is `alone`.
    """

    def __init__(self, name: str):
        super().__init__(f"{name} does not read the same inputs as the linears that it was grouped with")
        self.name = name


class LinearObserver:
    """Calls back with every input of the block's linears, once for all linears that read the same tensor.

    The linear that reads a tensor first leads a group; the others that read the same tensor (k and v after q, up after
    gate) join it during the first call in which they run. From then on the groups are fixed, and each call is checked
    to agree with them ([`Regroup`]). A linear that runs several times in a call is reported each time; one that does not
    run (an expert without tokens) is not reported, and joins or leads a group when it first runs.

    Attributes:
        groups: leader's name -> names of its group, the leader first; complete after the first call of the block.
    """

    def __init__(self, callback: Callable[[str, torch.Tensor], None], alone: Collection[str] = ()):
        self._alone = alone
        self.groups: dict[str, tuple[str, ...]] = {}
        self._callback = callback
        self._leader_of: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        self._readings: list[_Reading] = []
        self._read_by: dict[str, set[int]] = {}
        self._reports: dict[str, set[int]] = {}
        self._formed: set[str] = set()

    def _read(self, name: str, tensor: torch.Tensor) -> None:
        index = next((i for i, reading in enumerate(self._readings) if reading.is_of(tensor)), len(self._readings))
        if index == len(self._readings):
            self._readings.append(_Reading(tensor))
        reading = self._readings[index]
        self._read_by.setdefault(name, set()).add(index)

        leader = self._leader_of.get(name)
        if leader is None:
            leader = self._join_or_lead(name, index, reading)
        if leader not in reading.leaders:
            reading.leaders.add(leader)
            self._reports.setdefault(leader, set()).add(index)
            self._callback(leader, tensor.detach())

    def _join_or_lead(self, name: str, index: int, reading: _Reading) -> str:
        # Join only a group that has read exactly the same: this tensor, once, in this call.
        joinable = [leader for leader in reading.leaders if leader in self._formed and self._reports[leader] == {index}]
        leader = joinable[0] if joinable and name not in self._alone else name
        if leader == name and name not in self._alone:
            self._formed.add(name)
        self._leader_of[name] = leader
        self.groups[leader] = (*self.groups.get(leader, ()), name)
        return leader

    def _finish(self) -> None:
        for leader, reports in self._reports.items():
            for name in self.groups[leader]:
                read = self._read_by.get(name)
                if read is not None and read != reports:
                    raise Regroup(self._other(leader))
        self._start()

    def _other(self, leader: str) -> str:
        """The member of a group that reads more, or something else, than most of the group."""
        read = {name: self._read_by[name] for name in self.groups[leader] if name in self._read_by}
        common = set.intersection(*read.values())
        others = [name for name in read if read[name] != common and name != leader]
        return others[0] if others else leader


@contextmanager
def observe_linears(
    block: nn.Module,
    names: Sequence[str],
    callback: Callable[[str, torch.Tensor], None],
    alone: Collection[str] = (),
) -> Iterator[LinearObserver]:
    """Call `callback(leader, x)` for every input of the named linears, while the context is open.

    Args:
        block: the module that is run (`BlockInputs.call`), once or more, inside the context.
        names: dotted names of linears inside `block`.
        callback: is given the name of the group's leader and the input x [..., n], detached, before the leader runs.
            x is the model's own tensor: read it at once, do not keep or change it.
        alone: names that join no group.

    Yields:
        The observer. Its `groups` says who follows each leader; names in no group have not run.

    Raises:
        Regroup: linears that shared an input do not always share it.
    """
    observer = LinearObserver(callback, alone)

    def reader(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observer._read(name, args[0] if args else next(iter(kwargs.values())))

        return read

    with ExitStack() as stack:
        for name in names:
            hook = block.get_submodule(name).register_forward_pre_hook(reader(name), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(block.register_forward_pre_hook(lambda *_: observer._start()).remove)
        stack.callback(block.register_forward_hook(lambda *_: observer._finish()).remove)
        yield observer


class _Reached(Exception):
    """The watched linear was called: the rest of the model need not run."""


def observe_until(
    model: PreTrainedModel, linear: nn.Module, batches: Iterable[Batch], callback: Callable[[torch.Tensor], None]
) -> None:
    """Call back with the inputs of one linear; the model is not run beyond it.

    Args:
        model: of any kind.
        linear: a module of it that runs once in each forward pass.
        batches: token ids, each [N, T], or the model's keyword arguments.
        callback: gets the linear's input [N, T, n] of each batch.

    Raises:
        ValueError: the linear did not run.
    """

    def stop(_: nn.Module, arguments: tuple, named: dict) -> None:
        callback((arguments[0] if arguments else next(iter(named.values()))).detach())
        raise _Reached

    device = input_device(model)
    handle = linear.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(**{**move(keywords(model, batch), device), **without_cache(model)})
            except _Reached:
                continue
            raise ValueError(f"{type(model).__name__} did not run a linear that was to be calibrated ({linear})")
    finally:
        handle.remove()
