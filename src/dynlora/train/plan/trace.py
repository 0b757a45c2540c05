"""Which tensors come and go while a few rows are trained on, as a trace that any number can scale.

A dispatch mode sees every operation, in the backward pass too, and so every tensor's memory. What
an operation needs inside its kernel only, it does not see.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

FREED = -1
Event = tuple[int, int]
"""A storage's number, and its bytes when it is allocated or `FREED`."""


class AllocationTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the storages that operations allocate on one device, and when each is freed."""

    def __init__(self, device: torch.device, known: Iterable[Tensor]) -> None:
        """Begin.

        Args:
            device: Whose memory is meant; other devices' is left out.
            known: Tensors that are there already and not to be counted, such as the weights.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.phases: dict[str, int] = {}
        """By phase, the number of events before it."""
        self.device = device
        self._paused = False
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def begin(self, phase: str) -> None:
        """Note that a phase of the run begins."""
        self.phases[phase] = len(self.events)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Note nothing that is allocated meanwhile, unless it is seen again later."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def end(self) -> None:
        """Note no more, not even what is freed from now on."""
        self.phases["end"] = len(self.events)
        self.events = list(self.events)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and note what it allocated."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device.type:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if self._paused or storage in self._seen:
            return
        number = self._seen[storage] = len(self.events) + 1
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self.events.append, (number, FREED))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that tensors take, those that share their memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def scale(
    small: Sequence[Event], large: Sequence[Event], *, rows: int, wanted: int
) -> list[Event] | None:
    """Return the trace of as many rows as wanted; None if the two traces are not of one kind.

    The memory of every tensor is a straight line in the rows of a batch, of which two points are
    known.

    Args:
        small: Trace with batches of `rows` rows.
        large: Trace of the same with one row more.
        rows: At least 2: a batch of 1 is a special case of some operations.
        wanted: Rows of the batch that is meant, at least 1.
    """
    if len(small) != len(large):
        return None
    scaled = []
    for (number, before), (other, after) in zip(_in_order(small), _in_order(large), strict=True):
        if number != other or (before == FREED) != (after == FREED):
            return None
        size = before + (wanted - rows) * (after - before)
        scaled.append((number, FREED if before == FREED else max(size, 0)))
    return scaled


def _in_order(events: Sequence[Event]) -> Iterator[Event]:
    """Yield events with what is freed together ordered by number: torch empties caches in any."""
    for freed, group in groupby(events, key=lambda event: event[1] == FREED):
        found = list(group)
        yield from sorted(found) if freed else found


def most_live(events: Sequence[Event], begin: int = 0) -> int:
    """Return the most bytes that were allocated at once.

    Args:
        events: From the beginning of a trace on.
        begin: Events before which it does not matter how many there were.
    """
    sizes: dict[int, int] = {}
    live = most = 0
    for place, (number, size) in enumerate(events):
        if size == FREED:
            live -= sizes.pop(number)
        else:
            sizes[number] = size
            live += size
        if place >= begin:
            most = max(most, live)
    return most


def left_live(events: Iterable[Event]) -> int:
    """Return the bytes that are still allocated at the end."""
    sizes: dict[int, int] = {}
    for number, size in events:
        if size == FREED:
            del sizes[number]
        else:
            sizes[number] = size
    return sum(sizes.values())
