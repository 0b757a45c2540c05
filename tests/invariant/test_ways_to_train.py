"""Accumulated, checkpointed and scaled gradients: the run is the one that it would be without."""

import pytest
import torch

from tests.models import adamw, attached, lora_llama, loss_of, sequences, train

STEPS = 30
SETTINGS = {"total_steps": STEPS, "hysteresis": 0}


def control():
    """Train in float64 with whole batches."""
    model = lora_llama().double().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **SETTINGS)
    train(model, optimizer, dynamic, STEPS)
    assert len(set(dynamic.ranks.values())) > 1
    return model, dynamic


def assert_same(model, dynamic):
    expected, whole = control()
    assert dynamic.ranks == whole.ranks
    weights = expected.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, weights[name], rtol=0, atol=1e-6), name


@pytest.mark.parametrize("mode", ["physical", "static"])
def test_eight_accumulated_batches_of_one_are_a_batch_of_eight(mode):
    model = lora_llama().double().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, mode=mode, **SETTINGS)
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
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, **SETTINGS)
    train(model, optimizer, dynamic, STEPS)
    assert_same(model, dynamic)


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
            assert all(map(torch.equal, before, model.parameters()))
            assert set(dynamic.skipped.values()) == {1}
    assert len(dynamic.skipped) == len(dynamic.ranks)
    assert set(dynamic.skipped.values()) == {1}
    assert len(dynamic.history) == 5
    assert losses[-1] < 0.8 * losses[0]
