"""Accumulated, checkpointed and scaled gradients: the run is the one that it would be without."""

import itertools
from functools import cache

import pytest
import torch
from accelerate import Accelerator

from dynlora import RankPlan
from dynlora.errors import EngineError
from tests.models import adamw, attached, lora_llama, loss_of, sequences, trained

STEPS = 30
SETTINGS = {"total_steps": STEPS, "hysteresis": 0}


@cache
def control():
    """Train in float64 with whole batches."""
    model = lora_llama().double().train()
    _, dynamic = trained(model, STEPS, **SETTINGS)
    assert len(set(dynamic.ranks.values())) > 1
    return model, dynamic


def assert_same(model, dynamic):
    expected, whole = control()
    assert dynamic.ranks == whole.ranks
    weights = expected.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6), name


def test_eight_accumulated_batches_of_one_are_a_batch_of_eight():
    model = lora_llama().double().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **SETTINGS)
    batches = sequences(batch=8)
    for _ in range(STEPS):
        for row in next(batches):
            (loss_of(model, row[None]) / 8).backward()
        dynamic.observe()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()
    assert_same(model, dynamic)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = lora_llama().double().train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    _, dynamic = trained(model, STEPS, **SETTINGS)
    assert_same(model, dynamic)


@pytest.mark.parametrize("metric", ["signal", "sensitivity"])
def test_an_autocast_around_the_whole_step_leaves_what_is_observed_and_found_as_it_is(metric):
    runs = []
    for around in (False, True):
        model = lora_llama().train()
        optimizer, observed = adamw(model), []
        settings = SETTINGS | {"importance": metric, "total_steps": 20}
        dynamic = attached(model, optimizer, **settings)
        for tokens in itertools.islice(sequences(), 20):
            loss_of(model, tokens).backward()
            with torch.autocast("cpu", torch.float16, enabled=around):
                dynamic.observe()
                optimizer.step()
                dynamic.step()
            optimizer.zero_grad()
            observed += dynamic.state_dict()["importance"].values()
        runs.append((observed, dynamic.history))
    assert runs[0][0]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]
    assert any(layer.effective_rank for layer in runs[0][1][0].layers.values())


def test_a_step_that_overflows_in_half_precision_is_skipped_and_counted():
    model = lora_llama().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batches, losses, before = sequences(), [], None
    for step in range(STEPS):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, next(batches))
        overflows = step == 3
        scaler.scale(loss * (float("inf") if overflows else 1)).backward()
        scaler.unscale_(optimizer)
        if overflows:
            before = [p.detach().clone() for p in model.parameters()]
        dynamic.observe()
        scaler.step(optimizer)
        scaler.update()
        dynamic.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if overflows:
            pairs = zip(before, model.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
            assert set(dynamic.skipped.values()) == {1}
    assert len(dynamic.skipped) == len(dynamic.ranks)
    assert set(dynamic.skipped.values()) == {1}
    assert len(dynamic.history) == 5
    assert losses[-1] < 0.8 * losses[0]


def test_ranks_may_move_before_any_step_that_did_not_overflow():
    model = lora_llama().train()
    optimizer = adamw(model, fused=True)
    dynamic = attached(model, optimizer, total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, next(sequences())) * float("inf")).backward()
    scaler.unscale_(optimizer)
    dynamic.observe()
    scaler.step(optimizer)
    scaler.update()
    dynamic.step()
    dynamic.apply(RankPlan(step=1, ranks=dict.fromkeys(dynamic.ranks, 2)))
    assert set(dynamic.ranks.values()) == {2}


def test_gradients_of_a_part_of_the_batch_are_refused_with_where_to_read_them():
    model = lora_llama().train()
    dynamic = attached(model, adamw(model), total_steps=20)
    batches = sequences()
    loss_of(model, next(batches)).backward()
    dynamic.observe()
    loss_of(model, next(batches)).backward()
    with pytest.raises(EngineError, match=r"once a step, got a second call .* last `backward`"):
        dynamic.observe()


def test_accelerate_may_accumulate_with_both_calls_in_every_batch():
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    model = lora_llama().double().train()
    model, optimizer = accelerator.prepare(model, adamw(model))
    dynamic = attached(model, optimizer, **SETTINGS)
    batches = sequences(batch=8)
    for _ in range(STEPS):
        for rows in next(batches).chunk(4):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, rows))
                dynamic.observe()
                optimizer.step()
                dynamic.step()
                optimizer.zero_grad()
    assert_same(model, dynamic)
