"""torch.compile: ranks and layer weights change, and nothing is compiled anew."""

import copy
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch._dynamo.utils import counters

from dynlora.integrations.checkpoint import load_state, save_state
from tests.models import adamw, attached, bare_llama, lora_llama, sequences, train

STEPS, KILLED = 60, 20
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


def attached_to_compiled(model, *, attach_first=False):
    """Return a compiled model, its optimizer and a controller made before or after compiling."""
    optimizer = adamw(model)
    settings = SETTINGS | ({"mode": "static"} if attach_first else {})
    dynamic = attached(model, optimizer, **settings) if attach_first else None
    called = torch.compile(model, backend="eager", fullgraph=True)
    return called, optimizer, dynamic or attached(called, optimizer, **settings)


def compiled_run(*, attach_first):
    """Train; return all of it, with a checkpoint, the numbers of graphs by step, and outputs."""
    torch._dynamo.reset()
    counters.clear()
    model = lora_llama().train()
    called, optimizer, dynamic = attached_to_compiled(model, attach_first=attach_first)
    graphs, kept = [], []

    def after(step):
        graphs.append(counters["stats"]["unique_graphs"])
        if step == KILLED:
            parts = dynamic.state_dict(), model.state_dict(), optimizer.state_dict()
            kept.extend(copy.deepcopy(parts))

    train(called, optimizer, dynamic, STEPS, after=after)
    with torch.no_grad():
        outputs = called.eval()(input_ids=next(sequences(seed=5))).logits
    return SimpleNamespace(model=model, dynamic=dynamic, kept=kept, graphs=graphs, outputs=outputs)


@pytest.fixture(scope="module")
def run():
    return compiled_run(attach_first=False)


def assert_equal_to_the_last_bit(run, model, dynamic):
    assert dynamic.history == run.dynamic.history
    for name, weight in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight), name


@pytest.mark.parametrize("attach_first", [True, False])
def test_after_the_first_event_nothing_is_compiled_again(run, attach_first):
    if attach_first:
        other = compiled_run(attach_first=True)
        assert_equal_to_the_last_bit(run, other.model, other.dynamic)
        run = other
    events = run.dynamic.history
    assert run.dynamic.mode == "static"
    assert len(events) == SETTINGS["events"]
    changes = [any(x.rank_before != x.rank_after for x in e.layers.values()) for e in events[1:]]
    assert sum(changes) >= 3
    assert len({tuple(x.weight for x in event.layers.values()) for event in events}) > 3
    first = events[0].step
    assert run.graphs[first - 2] == 1  # one graph for the whole model, none for a hook
    # Scales are numbers that may change from there on.
    assert run.graphs[first + 1] == run.graphs[-1] == 2


def test_a_compiled_run_is_the_run_that_is_not_compiled(run):
    model = lora_llama().train()
    optimizer = adamw(model)
    control = attached(model, optimizer, mode="static", **SETTINGS)
    train(model, optimizer, control, STEPS)
    assert_equal_to_the_last_bit(run, model, control)


def test_the_adapter_of_a_compiled_run_loads_in_plain_peft(run, tmp_path):
    assert len(set(run.dynamic.ranks.values())) > 1
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    with torch.no_grad():
        outputs = loaded.eval()(input_ids=next(sequences(seed=5))).logits
    torch.testing.assert_close(run.outputs, outputs, rtol=0, atol=1e-5)


def test_a_compiled_run_that_was_killed_ends_bit_for_bit_the_same(run, tmp_path):
    state, saved_weights, saved_optimizer = run.kept
    save_state(tmp_path, state)
    model = lora_llama().train()
    called, optimizer, dynamic = attached_to_compiled(model)
    dynamic.load_state_dict(load_state(tmp_path))
    model.load_state_dict(saved_weights)
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer))
    batches = itertools.islice(sequences(), KILLED, None)
    train(called, optimizer, dynamic, STEPS - KILLED, batches)
    assert_equal_to_the_last_bit(run, model, dynamic)


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
