"""Attach to a model that an engine has wrapped already, in each of several processes."""

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dynlora import DynamicLora, DynamicLoraConfig
from tests.distributed.scenarios import CONFIG, batches, model_in_float64, optimizer_of
from tests.models import loss_of


def main() -> None:
    """Take a step the wrong way."""
    distributed.init_process_group("gloo")
    model = model_in_float64()
    wrapped = DistributedDataParallel(model)
    dynamic = DynamicLora(model, optimizer_of(model), DynamicLoraConfig(**CONFIG))
    (tokens,) = batches(0, 1, part=distributed.get_rank())
    loss_of(wrapped, tokens).backward()
    dynamic.observe()


if __name__ == "__main__":
    main()
