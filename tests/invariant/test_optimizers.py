"""Invariant 5, for every optimizer that docs/method.md names: its state survives, or it is said."""

import copy
import itertools
import logging
from functools import partial

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.optim import AdamW as BitsandbytesAdamW
from bitsandbytes.optim import AdamW8bit
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon

from dynlora import RankPlan
from dynlora.importance.agreement import AgreementTest
from tests.models import attached, lora_llama, sequences, train

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
    "AdamW8bit of bitsandbytes": lambda ps: AdamW8bit(ps, lr=5e-3, min_8bit_size=16),
    "AdamW of bitsandbytes, as Trainer makes it": lambda ps: BitsandbytesAdamW(
        ps, lr=5e-3, optim_bits=8
    ),
}
RESTARTED = {
    "Adafactor of torch": lambda ps: Adafactor(ps, lr=1.0),
    "Adafactor of transformers": lambda ps: transformers.Adafactor(
        ps, lr=5e-3, relative_step=False, scale_parameter=False
    ),
}


@pytest.fixture
def moving(monkeypatch):
    """Let ranks move whether or not batches agree."""
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("name", [*FOLLOWED, *RESTARTED])
def test_training_goes_on_through_events(name):
    make = (FOLLOWED | RESTARTED)[name]
    model = lora_llama().train()
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, **SETTINGS)
    losses = train(model, optimizer, dynamic, STEPS)
    assert len({tuple(e.layers[n].rank_after for n in e.layers) for e in dynamic.history}) > 2
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert all(torch.isfinite(p).all() for p in model.parameters())


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


def dequantised(state, number):
    """Return a moment of bitsandbytes as its functions read it."""
    moment = state[f"state{number}"]
    if moment.dtype == torch.float32:
        return moment
    return dequantize_blockwise(
        moment, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
    )


def with_moments(make):
    """Return an optimizer after steps with a learning rate of 0, and its controller."""
    model = lora_llama(r=8).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator).mul_(0.1)
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    train(model, optimizer, dynamic, 12)
    return optimizer, dynamic


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_eight_bit_moments_follow_like_those_of_torch_in_the_precision_of_the_new_size(paged):
    torchs, exact = with_moments(lambda ps: AdamW(ps, lr=0.0))
    quantised, rounded = with_moments(
        lambda ps: AdamW8bit(ps, lr=0.0, min_8bit_size=120, is_paged=paged)
    )
    pairs = [
        (torchs.state[mine], theirs, quantised.state)
        for layer, other in zip(exact._layers, rounded._layers, strict=True)
        for mine, theirs in zip(layer.parameters, other.parameters, strict=True)
    ]
    for state, theirs, states in pairs:
        state["exp_avg"].copy_(dequantised(states[theirs], 1))
        state["exp_avg_sq"].copy_(dequantised(states[theirs], 2))
    first = next(iter(exact.ranks))
    for dynamic in (exact, rounded):
        dynamic.apply(RankPlan(step=12, ranks=dict.fromkeys(dynamic.ranks, 6)))
        dynamic.apply(RankPlan(step=12, ranks={first: 9}))
    precisions = set()
    for state, theirs, states in pairs:
        moments = states[theirs]
        assert (moments["state1"].dtype == torch.uint8) == (theirs.numel() >= 120)
        precisions.add(moments["state1"].dtype)
        assert moments["step"] == state["step"] == 10
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
            error = (dequantised(moments, number) - state[key]).abs().max()
            assert error <= 0.02 * state[key].abs().max()  # of two roundings to 8 bits
    assert precisions == {torch.uint8, torch.float32}


@pytest.mark.usefixtures("moving")
def test_a_run_with_eight_bit_moments_resumes_bit_for_bit():
    def started():
        model = lora_llama().train()
        optimizer = AdamW8bit(trainable(model), lr=5e-3, min_8bit_size=60)
        return attached(model, optimizer, **SETTINGS), model, optimizer

    def continued(parts, batches):
        dynamic, model, optimizer = parts
        train(model, optimizer, dynamic, 10, iter(batches))
        return dynamic.ranks, trainable(model)

    first, second = started(), started()
    batches = list(itertools.islice(sequences(), 20))
    continued(first, batches[:10])
    for part, saved in zip(second, first, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    (ranks, weights), (same_ranks, same_weights) = (
        continued(parts, batches[10:]) for parts in (first, second)
    )
    assert len(set(ranks.values())) > 1
    assert ranks == same_ranks
    assert all(map(torch.equal, weights, same_weights))


def moved(dynamic, step):
    """Shrink by one as many layers as the tolerance allows, at most half; grow the others."""
    ranks, left = dict(dynamic.ranks), 0
    costs = {layer.name: layer.cost for layer in dynamic._layers}
    features, tolerance = dynamic._analyzer.stats(), dynamic.config.shrink_tolerance
    lowest = dynamic._adapters.lowest_ranks(list(ranks), features, tolerance=tolerance)
    able = [name for name in ranks if lowest[name] < ranks[name]]
    for name in able[: len(ranks) // 2]:
        ranks[name] -= 1
        left += costs[name]
    for name in [name for name in ranks if ranks[name] == 8]:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    event = dynamic.apply(RankPlan(step=step, ranks=ranks))
    assert sum(layer.rank_after < layer.rank_before for layer in event.layers.values()) >= 2
    assert sum(layer.rank_after > layer.rank_before for layer in event.layers.values()) >= 2
    return event


@pytest.mark.parametrize(
    "make",
    [AdamW, partial(AdamW8bit, min_8bit_size=16)],
    ids=["AdamW", "AdamW8bit"],
)
def test_no_element_moves_more_than_one_learning_rate_right_after_an_event(make):
    model = lora_llama(r=8)
    optimizer = make(trainable(model), lr=5e-3, weight_decay=0.01)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=10_000)
    batches = sequences()
    # Long enough that plain Adam itself no longer exceeds one learning rate, as it does early on.
    train(model, optimizer, dynamic, 120, batches=batches)
    moved(dynamic, 120)
    before = [p.detach().clone() for p in trainable(model)]
    train(model, optimizer, dynamic, 1, batches=batches)
    for old, new in zip(before, trainable(model), strict=True):
        step = (new.detach() - old * (1 - 5e-3 * 0.01)).abs().max()
        assert step <= 5e-3 * (1 + 1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: AdamW(ps, lr=5e-3, fused=True),
        lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    ],
    ids=["AdamW", "SGD"],
)
def test_loss_stays_in_the_band_of_a_control_for_fifty_steps_after_an_event(make):
    model = lora_llama(r=8)
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, importance="uniform", total_steps=10_000)
    batches = list(itertools.islice(sequences(batch=32), 150))
    train(model, optimizer, dynamic, 100, iter(batches))
    parts = (dynamic, model, optimizer)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    control = torch.tensor(train(model, optimizer, dynamic, 50, iter(batches[100:])))
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    moved(dynamic, 100)
    other = torch.tensor(train(model, optimizer, dynamic, 50, iter(batches[100:])))
    # The stated band: 2 % at any step, 0.5 % in the mean of the 50.
    assert (other / control - 1).abs().max() < 0.02
    assert abs(other.mean() / control.mean() - 1) < 0.005
