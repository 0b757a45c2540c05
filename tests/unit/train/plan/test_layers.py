"""Layers by kind and the bounds of their ranks: those that the controller itself has."""

import pytest

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.adjuster import bound_layers
from dynlora.train.plan.layers import group_layers, plan_ranks
from tests.models import adamw, lora_llama


def test_layers_of_one_name_and_shape_are_one_group() -> None:
    groups = group_layers(lora_llama(r=4))
    assert sum(group.count for group in groups) == 14
    by_name = {group.ending: group for group in groups}
    assert by_name["down_proj"].count == 2
    assert (by_name["down_proj"].in_features, by_name["down_proj"].out_features) == (64, 32)
    assert by_name["down_proj"].parameters == 4 * (64 + 32)
    assert by_name["k_proj"].parameters == 4 * (32 + 16)
    assert by_name["q_proj"].kind == "Linear"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_rank": 2, "max_rank": 5},
        {"max_rank": 100},
        {"pinned": ("*q_proj",)},
        {"events": 2, "first_event": 0.5, "last_event": 1.0},
    ],
)
def test_bounds_and_events_are_the_controllers(settings: dict[str, object]) -> None:
    config = DynamicLoraConfig(total_steps=40, **settings)
    planned = plan_ranks(lora_llama(r=4), config, 4, 40)
    model = lora_llama(r=4)
    dynamic = DynamicLora(model, adamw(model), config)
    bounds = bound_layers(dynamic._layers, dynamic.config, max_rank=dynamic._max_rank).values()
    assert planned.lowest == min(bound.floor for bound in bounds)
    assert planned.highest == max(bound.ceiling for bound in bounds)
    assert planned.pinned == (2 if "pinned" in settings else 0)
    assert tuple(planned.events) == tuple(dynamic._events)


def test_steps_decide_the_events_where_the_configuration_does_not() -> None:
    planned = plan_ranks(lora_llama(), DynamicLoraConfig(), 4, 200)
    assert list(planned.events) == [10, 22, 35, 48, 60]
