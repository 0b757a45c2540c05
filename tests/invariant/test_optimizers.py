"""Every optimizer that docs/method.md names: followed exactly, or started anew and said so."""

import logging

import pytest
import torch
import transformers
from bitsandbytes.optim import AdamW as BitsandbytesAdamW
from bitsandbytes.optim import AdamW8bit
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon

from dynlora import RankPlan
from dynlora.errors import OptimizerError
from dynlora.importance.agreement import AgreementTest
from tests.models import attached, lora_llama, train

STEPS = 40
SETTINGS = {"importance": "random", "total_steps": STEPS, "hysteresis": 0, "uniform_mix": 0}
FOLLOWED = {
    "AdamW, foreach": lambda ps: AdamW(ps, lr=5e-3, foreach=True),
    "AdamW, fused": lambda ps: AdamW(ps, lr=5e-3, fused=True),
    "AdamW, amsgrad": lambda ps: AdamW(ps, lr=5e-3, amsgrad=True),
    "Adam": lambda ps: Adam(ps, lr=5e-3),
    "SGD": lambda ps: SGD(ps, lr=0.2),
    "SGD, momentum": lambda ps: SGD(ps, lr=0.05, momentum=0.9),
    "Muon": lambda ps: Muon(ps, lr=5e-3),
}
RESTARTED = {
    "Adafactor of torch": lambda ps: Adafactor(ps, lr=1.0),
    "Adafactor of transformers": lambda ps: transformers.Adafactor(
        ps, lr=5e-3, relative_step=False, scale_parameter=False
    ),
    "AdamW8bit of bitsandbytes": lambda ps: AdamW8bit(ps, lr=5e-3, min_8bit_size=16),
    "AdamW of bitsandbytes, as Trainer makes it": lambda ps: BitsandbytesAdamW(
        ps, lr=5e-3, optim_bits=8
    ),
}


@pytest.fixture(autouse=True)
def moving(monkeypatch):
    """Let ranks move whether or not batches agree."""
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, "physical") for name in (*FOLLOWED, *RESTARTED) if name != "Muon"),
        ("SGD, momentum", "static"),
        ("Adafactor of torch", "static"),
    ],
)
def test_training_goes_on_through_events(name, mode):
    make = (FOLLOWED | RESTARTED)[name]
    model = lora_llama().train()
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, mode=mode, **SETTINGS)
    losses = train(model, optimizer, dynamic, STEPS)
    assert len({tuple(e.layers[n].rank_after for n in e.layers) for e in dynamic.history}) > 2
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_muon_trains_through_events_and_is_refused_where_its_steps_follow_the_held_rank():
    model = lora_llama().train()
    dynamic = attached(model, optimizer := FOLLOWED["Muon"](trainable(model)), **SETTINGS)
    losses = train(model, optimizer, dynamic, STEPS)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    with pytest.raises(OptimizerError, match="got Muon in static mode"):
        attached(model, FOLLOWED["Muon"](trainable(model)), mode="static", **SETTINGS)


@pytest.mark.parametrize("name", RESTARTED)
def test_state_that_cannot_follow_starts_anew_in_the_layers_that_change_alone(name, caplog):
    model = lora_llama().train()
    optimizer = RESTARTED[name](trainable(model))
    with caplog.at_level(logging.WARNING, logger="dynlora"):
        dynamic = attached(model, optimizer, **SETTINGS)
    assert [r.getMessage() for r in caplog.records] == [
        f"the state of {type(optimizer).__name__} cannot follow a change of rank: that of a layer "
        "which changes starts anew at each event"
    ]
    train(model, optimizer, dynamic, 3)
    layer, other = dynamic._layers[:2]
    dynamic.apply(RankPlan(step=3, ranks={layer.name: 2}))
    assert all(parameter not in optimizer.state for parameter in layer.parameters)
    assert all(optimizer.state[parameter] for parameter in other.parameters)


def test_muons_momentum_is_that_of_training_in_the_new_basis():
    def moments(*, resize_first):
        model = lora_llama().train()
        optimizer = Muon(trainable(model), lr=0.0, weight_decay=0.0)
        dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
        layer = dynamic._layers[0]
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            layer.lora_A[3], layer.lora_B[:, 3] = layer.lora_A[0] - layer.lora_A[1], 0.1
            layer.lora_B[:, 3] = layer.lora_B[:, 2]  # of rank 3: the shrink loses nothing
        dynamic.freeze()
        plan = RankPlan(step=0, ranks={layer.name: 3})
        if resize_first:
            dynamic.apply(plan)
        train(model, optimizer, None, 8)
        if not resize_first:
            dynamic.apply(plan)
        return [optimizer.state[p]["momentum_buffer"] for p in layer.parameters]

    for ours, theirs in zip(moments(resize_first=False), moments(resize_first=True), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 + 1e-4 * float(theirs.abs().max()))
