"""Counts of skipped observations, without a device synchronization per step."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class SkippedObservations:
    """Counts by module name; counts of gradients stay on their device until `counts` is called."""

    def __init__(self, names: Sequence[str], counts: Mapping[str, int] | None = None) -> None:
        """Start with earlier counts.

        Args:
            names: All layers.
            counts: Earlier counts by module name; None for none.
        """
        self._names = names
        self._read = Counter(counts)
        self._unread: Tensor | None = None

    def add(self, names: Iterable[str]) -> None:
        """Count one skipped observation for each named layer."""
        self._read.update(names)

    def add_broken(self, finite: Mapping[str, Tensor]) -> None:
        """Count the layers whose gradients are not finite.

        Args:
            finite: Boolean tensor of shape ``()`` by module name, for at least one layer.
        """
        absent = next(iter(finite.values())).new_ones(())
        broken = ~torch.stack([finite.get(name, absent) for name in self._names])
        self._unread = broken.long() if self._unread is None else self._unread + broken

    def counts(self) -> Counter[str]:
        """Return the counts so far; synchronizes with the device."""
        if self._unread is not None:
            counts = dict(zip(self._names, self._unread.tolist(), strict=True))
            self._read.update({name: count for name, count in counts.items() if count})
            self._unread = None
        return Counter(self._read)
