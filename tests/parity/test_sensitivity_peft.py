"""`sensitivity` against PEFT's own AdaLoRA: both averages by element, and a layer's score."""

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator

from dynlora.importance.sensitivity import BETA, SensitivityMetric
from tests.lora_layers import layers_of, lora_chain, set_gradients


def rank_allocator(model):
    """Return PEFT's allocator with the same two averages as ours."""
    config = AdaLoraConfig(
        beta1=BETA, beta2=BETA, init_r=4, target_r=2, tinit=1, tfinal=1, total_step=100
    )
    return RankAllocator(model, config, "default")


def peft_name(layer, weight):
    return f"base_model.model.{layer.name}.lora_{weight}.default.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_averages_and_the_score_are_those_of_peft(dtype):
    model = lora_chain(12, 8, 10, dtype=dtype)
    layers = layers_of(model)
    metric, reference = SensitivityMetric(), rank_allocator(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(30):
        set_gradients(layers, seed=step)
        metric.observe(layers)
        reference.update_ipt(model)
        optimizer.step()
        state = metric.state_dict()
        for layer in layers:
            for weight in "AB":
                name = peft_name(layer, weight)
                ours = state[f"{layer.name}/{weight}"]
                expected = torch.stack([reference.exp_avg_ipt[name], reference.exp_avg_unc[name]])
                torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-7)
    scores = metric.scores(layers, {})
    for layer in layers:
        names = [peft_name(layer, weight) for weight in "AB"]
        elements = torch.cat([reference._element_score(name).flatten() for name in names])
        assert scores[layer.name] == pytest.approx(float(elements.mean()), rel=1e-4)
