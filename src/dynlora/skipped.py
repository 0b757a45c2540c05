"""What was left out of the observations, counted without waiting for the device in every step."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class SkippedObservations:
    """Counts by module name; those of gradients stay on their device until somebody asks."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        self._read = Counter(counts)
        self._names: list[str] = []
        self._unread: Tensor | None = None

    def add(self, names: Iterable[str]) -> None:
        """Count layers that are known to be left out."""
        self._read.update(names)

    def add_unless(self, kept: Tensor, names: Sequence[str]) -> None:
        """Count the layers whose place in `kept` is False.

        Args:
            kept: Booleans of shape ``(len(names),)``.
            names: Module names; others than last time are a reason to read what was counted.
        """
        if self._unread is None or self._names != list(names):
            self._take()
            self._names, self._unread = list(names), torch.zeros_like(kept, dtype=torch.int64)
        self._unread += ~kept

    def counts(self) -> Counter[str]:
        """Return the counts so far; reads what the device holds."""
        self._take()
        return Counter(self._read)

    def _take(self) -> None:
        if self._unread is not None:
            counts = zip(self._names, self._unread.tolist(), strict=True)
            self._read.update({name: count for name, count in counts if count})
            self._unread = None
