"""Counts of what torch is asked to do."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class CountedOperations(TorchDispatchMode):
    """Counts by name the operations that do something: those that return views do not."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returned = [value.alias_info for value in operation._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.asked[operation.overloadpacket.__name__] += 1
        return operation(*args, **kwargs or {})
