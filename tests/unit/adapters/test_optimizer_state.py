"""Which optimizers are followed, and what is checked and dropped; parity checks the moments."""

import re

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim import Adagrad, AdamW, NAdam, Optimizer

from dynlora.adapters.optimizer_state import drop_unfit_state, unwrap_optimizer
from dynlora.errors import OptimizerError
from tests.lora_layers import layers_of, lora_chain, set_gradients


def weights_of(model):
    return [weight for layer in layers_of(model) for weight in (layer.lora_A, layer.lora_B)]


def test_the_optimizer_inside_accelerates_wrapper_is_found():
    optimizer = AdamW(weights_of(lora_chain(6, 5)))
    try:
        wrapped = Accelerator().prepare_optimizer(optimizer)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert type(wrapped) is not AdamW
    assert unwrap_optimizer(wrapped) is optimizer


class Custom(AdamW):
    """Whose state may differ from AdamW's."""


class Lookahead(Optimizer):
    """As is found elsewhere: it keeps slow weights of the parameters' shapes."""

    def __init__(self, parameters):
        self.optimizer = AdamW(parameters)
        super().__init__(self.optimizer.param_groups, {})


@pytest.mark.parametrize("kind", [Adagrad, NAdam, Custom, Lookahead])
def test_other_optimizers_and_wrappers_are_refused_with_those_that_work(kind):
    message = re.escape(
        "must be one of torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon, an "
        "Adafactor or one of bitsandbytes' Adam and AdamW, got "
        f"{kind.__module__}.{kind.__name__}, whose state cannot follow"
    )
    with pytest.raises(OptimizerError, match=message):
        unwrap_optimizer(kind(weights_of(lora_chain(6, 5))))


def test_moments_of_other_ranks_are_dropped_and_all_others_are_kept():
    model, other = lora_chain(6, 5, 4), lora_chain(6, 5, 4, r=3)
    optimizer = AdamW(weights_of(model))
    set_gradients(layers_of(model), seed=0)
    optimizer.step()
    first, second = layers_of(model)
    for parameter, wider in zip(first.parameters, layers_of(other)[0].parameters, strict=True):
        parameter.data = wider.data
    assert drop_unfit_state(optimizer, [*first.parameters, *second.parameters]) == 2
    assert set(optimizer.state) == set(second.parameters)
