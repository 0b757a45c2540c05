"""Which optimizers are followed, and what is checked and dropped; parity checks the moments."""

import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim import Adagrad, AdamW, NAdam, Optimizer

from dynlora.adapters.optimizer_state import fit_state, unwrap_optimizer
from dynlora.adapters.static import hold_static
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


def factors_of(model):
    return [(f, layer.r) for layer in layers_of(model) for f in (layer.factor_A, layer.factor_B)]


def test_moments_with_zeros_beyond_the_live_rank_are_cut_and_those_without_are_padded():
    model = lora_chain(6, 5)
    optimizer = AdamW(weights_of(model))
    set_gradients(layers_of(model), seed=0)
    optimizer.step()
    (layer,) = layers_of(model)
    narrow = {f: optimizer.state[f.parameter]["exp_avg"].clone() for f, _ in factors_of(model)}
    hold_static(model, [layer], 5)
    assert fit_state(optimizer, factors_of(model)) == 0
    for factor, _ in factors_of(model):
        wide = optimizer.state[factor.parameter]["exp_avg"]
        assert wide.shape == factor.parameter.shape != narrow[factor].shape
        assert torch.equal(factor.live(wide, layer.r), factor.to_matrix(narrow[factor]))
    moments = optimizer.state_dict()

    again = lora_chain(6, 5)
    optimizer = AdamW(weights_of(again))
    optimizer.load_state_dict(moments)
    assert fit_state(optimizer, factors_of(again)) == 0
    for (factor, _), expected in zip(factors_of(again), narrow.values(), strict=True):
        assert torch.equal(optimizer.state[factor.parameter]["exp_avg"], expected)
