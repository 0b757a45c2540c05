"""Runs a script, and checks that it frees its wrapped model before the process group ends."""

import runpy
import sys
import weakref

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

made = []
wrap, destroy = DistributedDataParallel.__init__, distributed.destroy_process_group


def remember_and_wrap(self: DistributedDataParallel, *args: object, **options: object) -> None:
    """Wrap a model."""
    made.append(weakref.ref(self))
    wrap(self, *args, **options)


def check_and_destroy(group: distributed.ProcessGroup | None = None) -> None:
    """Destroy the group if no reducer would then hold its last reference."""
    assert made
    assert [model() for model in made] == [None] * len(made)
    destroy(group)
    print("process group destroyed after DistributedDataParallel", flush=True)


DistributedDataParallel.__init__ = remember_and_wrap
distributed.destroy_process_group = check_and_destroy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
