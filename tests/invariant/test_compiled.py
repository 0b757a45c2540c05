"""torch.compile: ranks and layer weights change, and nothing is compiled anew."""

import copy
import gc
import itertools

import pytest
import torch
from peft import PeftModel
from torch._dynamo.utils import counters

from dynlora.integrations.checkpoint import load_state, save_state
from tests.models import adamw, attached, bare_llama, lora_llama, sequences, train

STEPS = 60
SETTINGS = {
    "importance": "random",
    "total_steps": STEPS,
    "hysteresis": 0,
    "layer_weights": True,
    "events": 6,
    "fused": False,
}


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled_run(model, *, attach_first):
    """Train a compiled model; return the controller, and how many graphs there are by step."""
    optimizer = adamw(model)
    if attach_first:
        dynamic = attached(model, optimizer, mode="static", **SETTINGS)
        called = torch.compile(model, backend="eager", fullgraph=True)
    else:
        called = torch.compile(model, backend="eager", fullgraph=True)
        dynamic = attached(called, optimizer, **SETTINGS)
    seen = []
    train(called, optimizer, dynamic, STEPS, after=lambda _: seen.append(graphs()))
    return dynamic, seen


@pytest.fixture(scope="module")
def whole():
    """Train a compiled model without interruption, keeping a checkpoint of every step."""
    model = lora_llama().train()
    optimizer = adamw(model)
    called = torch.compile(model, backend="eager", fullgraph=True)
    dynamic = attached(called, optimizer, **SETTINGS)
    checkpoints = {}

    def keep(step):
        parts = (dynamic.state_dict(), model.state_dict(), optimizer.state_dict())
        checkpoints[step] = copy.deepcopy(parts)

    train(called, optimizer, dynamic, STEPS, after=keep)
    assert len({event.step for event in dynamic.history}) == SETTINGS["events"]
    return model.state_dict(), dynamic.history, checkpoints


@pytest.mark.parametrize("attach_first", [True, False])
def test_after_the_first_event_nothing_is_compiled_again(attach_first):
    dynamic, seen = compiled_run(lora_llama().train(), attach_first=attach_first)
    assert dynamic.mode == "static"
    first, *later = [event.step for event in dynamic.history]
    changes = [
        any(layer.rank_before != layer.rank_after for layer in event.layers.values())
        for event in dynamic.history[1:]
    ]
    weights = {tuple(layer.weight for layer in e.layers.values()) for e in dynamic.history}
    assert sum(changes) >= 3
    assert len(later) >= 4
    assert len(weights) > 3
    assert seen[first - 2] == 1  # one graph for the whole model, none for a hook
    assert seen[first + 1] == seen[-1] == 2  # scales are numbers that may change from there on


def test_a_compiled_run_is_the_run_that_is_not_compiled_to_the_last_bit():
    models = [lora_llama().train() for _ in range(2)]
    dynamic, _ = compiled_run(models[0], attach_first=True)
    optimizer = adamw(models[1])
    control = attached(models[1], optimizer, mode="static", **SETTINGS)
    train(models[1], optimizer, control, STEPS)
    assert dynamic.history == control.history
    for name, weight in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], weight), name


def test_the_adapter_of_a_compiled_run_loads_in_plain_peft(whole, tmp_path):
    model = lora_llama().train()
    called = torch.compile(model, backend="eager", fullgraph=True)
    dynamic = attached(called, adamw(model), **SETTINGS)
    dynamic.load_state_dict(whole[2][STEPS][0])
    model.load_state_dict(whole[2][STEPS][1])
    assert len(set(dynamic.ranks.values())) > 1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    tokens = next(sequences(seed=5))
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=tokens).logits for m in (called, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("killed_at", [10])
def test_a_compiled_run_that_was_killed_ends_bit_for_bit_the_same(whole, killed_at, tmp_path):
    weights, history, checkpoints = whole
    state, saved_weights, saved_optimizer = checkpoints[killed_at]
    save_state(tmp_path, state)
    model = lora_llama().train()
    optimizer = adamw(model)
    called = torch.compile(model, backend="eager", fullgraph=True)
    dynamic = attached(called, optimizer, **SETTINGS)
    dynamic.load_state_dict(load_state(tmp_path))
    model.load_state_dict(saved_weights)
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer))
    batches = itertools.islice(sequences(), killed_at, None)
    train(called, optimizer, dynamic, STEPS - killed_at, batches=batches)
    assert dynamic.history == history
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def stance():
    return torch._dynamo.eval_frame._stance.stance


def test_compiled_code_is_off_while_anybody_looks_and_on_again_after_the_last():
    runs = [
        attached(model, adamw(model), mode="static", **SETTINGS)
        for model in (lora_llama().train(), lora_llama().train())
    ]
    assert stance() == "force_eager"
    runs[0].close()
    assert stance() == "force_eager"
    runs[1].close()
    assert stance() == "default"


def test_a_run_that_is_forgotten_leaves_the_compiler_on():
    model = lora_llama().train()
    attached(model, adamw(model), mode="static", **SETTINGS)
    assert stance() == "force_eager"
    del model
    gc.collect()
    assert stance() == "default"
