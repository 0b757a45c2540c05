"""Invariant 6: a run killed at any step and resumed ends bit for bit where it would have ended.

The loop of one's own is here; the Trainer's own resume is in `integration/test_trainer.py`.
"""

import copy
from functools import cache

import pytest
import torch

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.integrations.checkpoint import load_state, save_state
from tests.models import WINDOW, adamw, attached, lora_llama, loss_of, sequences, train

STEPS = 40
KILLS = [
    *(("signal", None, step) for step in (1, 5, 6, 7, 20)),
    *(("signal", 0.5, step) for step in (5, 6, 7, 20)),
    ("sensitivity", None, 6), ("gradient_norm", None, 7), ("fisher", None, 5),
    ("attention_entropy", None, 13), ("random", None, 20),
]  # fmt: skip
"""Metric, `budget_end` and step: all steps for the default metric, one for each other."""
CONFIG = {"total_steps": STEPS, "hysteresis": 0, **WINDOW}


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def batches_from(step):
    batches = sequences()
    for _ in range(step):
        next(batches)
    return batches


@cache
def whole(importance, budget_end):
    """Train without interruption; return weights, events and a checkpoint of every step."""
    torch.manual_seed(0)
    model = lora_llama(r=8)
    optimizer = adamw(model)
    settings = {"importance": importance, "budget_end": budget_end, **CONFIG}
    dynamic = attached(model, optimizer, **settings)
    checkpoints = {}

    def keep(step):
        parts = (dynamic.state_dict(), lora_weights(model), optimizer.state_dict())
        checkpoints[step] = copy.deepcopy(parts)

    train(model, optimizer, dynamic, STEPS, after=keep)
    assert len(set(dynamic.ranks.values())) > 1
    return lora_weights(model), dynamic.history, checkpoints


@pytest.mark.parametrize(("importance", "budget_end", "killed_at"), KILLS)
def test_a_run_resumed_from_disk_ends_bit_for_bit_the_same(
    importance, budget_end, killed_at, tmp_path
):
    weights, history, checkpoints = whole(importance, budget_end)
    state, saved_weights, saved_optimizer = checkpoints[killed_at]
    save_state(tmp_path, state)

    torch.manual_seed(123)  # a new process has another random state
    model = lora_llama(r=8)
    optimizer = adamw(model)
    settings = {"importance": importance, "budget_end": budget_end, **CONFIG}
    dynamic = attached(model, optimizer, **settings)
    dynamic.load_state_dict(load_state(tmp_path))
    model.load_state_dict(saved_weights, strict=False)
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer))
    train(model, optimizer, dynamic, STEPS - killed_at, batches=batches_from(killed_at))

    resumed = lora_weights(model)
    assert weights.keys() == resumed.keys()
    for name, value in weights.items():
        assert torch.equal(value, resumed[name]), name
    assert dynamic.history == history


def test_loading_a_state_twice_is_loading_it_once(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = DynamicLora(tiny_llama, optimizer, DynamicLoraConfig(**CONFIG))
    train(tiny_llama, optimizer, dynamic, 15)
    state = copy.deepcopy(dynamic.state_dict())
    dynamic.load_state_dict(copy.deepcopy(state))
    dynamic.load_state_dict(copy.deepcopy(state))
    again = dynamic.state_dict()
    assert {k: v for k, v in again.items() if k not in ("importance", "features")} == {
        k: v for k, v in state.items() if k not in ("importance", "features")
    }
    for group in ("importance", "features"):
        assert again[group].keys() == state[group].keys()
        assert all(torch.equal(again[group][k], state[group][k]) for k in state[group])
    assert torch.isfinite(loss_of(tiny_llama, next(sequences())))
