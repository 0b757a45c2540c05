"""One process leaves while Gloo still frees a tensor (torchrun -m tests....leaving_worker)."""

import time

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.scenarios import leave


class SlowToFree(Tensor):
    """Needs the interpreter for two seconds when it is freed."""

    def __del__(self) -> None:
        """Wait."""
        time.sleep(2)


def main() -> None:
    """Leave the last reference to a tensor to Gloo's thread, then leave."""
    distributed.init_process_group("gloo")
    wrapped = DistributedDataParallel(nn.Linear(4, 4))
    wrapped(torch.ones(2, 4)).sum().backward()
    if distributed.get_rank() == 0:
        distributed.all_reduce(torch.ones(4).as_subclass(SlowToFree), async_op=True)
    else:
        time.sleep(1)
        distributed.all_reduce(torch.ones(4))
    leave()


if __name__ == "__main__":
    main()
