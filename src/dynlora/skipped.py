"""What was left out of the observations, counted without waiting for the device in every step."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class SkippedObservations:
    """Counts by module name; those of gradients stay on their device until somebody asks."""

    def __init__(self, names: Sequence[str], counts: Mapping[str, int] | None = None) -> None:
        """Begin with what was counted before.

        Args:
            names: All layers.
            counts: By module name; None for none.
        """
        self._names = names
        self._read = Counter(counts)
        self._unread: Tensor | None = None

    def add(self, names: Iterable[str]) -> None:
        """Count layers that are known to be left out."""
        self._read.update(names)

    def add_broken(self, finite: Mapping[str, Tensor]) -> None:
        """Count the layers whose gradients are not finite.

        Args:
            finite: Booleans of shape ``()`` by module name, at least one; layers may be missing.
        """
        absent = next(iter(finite.values())).new_ones(())
        broken = ~torch.stack([finite.get(name, absent) for name in self._names])
        self._unread = broken.long() if self._unread is None else self._unread + broken

    def counts(self) -> Counter[str]:
        """Return the counts so far; waits for the device that holds some of them."""
        if self._unread is not None:
            counts = dict(zip(self._names, self._unread.tolist(), strict=True))
            self._read.update({name: count for name, count in counts.items() if count})
            self._unread = None
        return Counter(self._read)
