"""Dynamic ranks over all parts of many architectures, without any code for one of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import GenerationMixin

from dynlora.importance.agreement import AgreementTest
from tests.architectures import CASES
from tests.models import adamw, attached

STEPS, KEPT, GENERATING = 16, 8, (6, 11)
MOVEMENT = {"last_event": 0.8, "hysteresis": 0, "shrink_tolerance": 1.0}


def count(model):
    """Count LoRA parameters from the tensors themselves."""
    factors = (".lora_A.", ".lora_B.")
    return sum(p.numel() for name, p in model.named_parameters() if any(f in name for f in factors))


def trained_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def started(case):
    model = case.model()
    optimizer = adamw(model, lr=1e-2)
    return model, optimizer, attached(model, optimizer, total_steps=STEPS, **MOVEMENT)


@pytest.fixture(scope="module", autouse=True)
def _scored():
    """Let scores count that 16 steps cannot prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        yield


def train(case, model, optimizer, dynamic, steps, after):
    losses = []
    for step in steps:
        loss = case.loss(model)
        loss.backward()
        dynamic.observe()
        optimizer.step()
        dynamic.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step)
    return losses


def generate(case, model):
    """Write three tokens, in training mode, if the model can."""
    if isinstance(model, PeftModel) and isinstance(model.get_base_model(), GenerationMixin):
        given = {key: value for key, value in case.batch().items() if key != "labels"}
        written = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert len(written) == len(next(iter(given.values())))


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """Train a case, and generate text between some steps."""
    case = CASES[request.param]
    model, optimizer, dynamic = started(case)
    held, kept, first = [count(model)], [], dynamic.ranks

    def after(step):
        held.append(count(model))
        if step == KEPT:
            state = dynamic.state_dict(), trained_weights(model), optimizer.state_dict()
            kept.extend(copy.deepcopy(state))
        if step in GENERATING:
            generate(case, model)

    losses = train(case, model, optimizer, dynamic, range(1, STEPS + 1), after)
    return SimpleNamespace(
        case=case, model=model, dynamic=dynamic, first=first, held=held, kept=kept, losses=losses
    )


def test_ranks_move_in_every_part_under_one_budget(run):
    assert run.losses[-1] < 0.95 * run.losses[0]
    assert not run.dynamic.skipped
    assert run.dynamic.budget == run.held[0]
    assert max(run.held) <= run.dynamic.budget
    moved = [name for name, r in run.dynamic.ranks.items() if r != run.first[name]]
    for part in run.case.parts:
        assert any(part in name.split(".") for name in moved)


@torch.no_grad()
def test_stock_loaders_read_the_saved_adapter_with_equal_outputs(run, tmp_path):
    assert len(set(run.dynamic.ranks.values())) > 1
    loaded = run.case.reloaded(run.model, tmp_path)
    assert torch.equal(run.case.loss(loaded), run.case.loss(run.model))


def test_a_resumed_run_that_generates_nothing_ends_bit_for_bit_the_same(run):
    state, weights, optimizer_state = run.kept
    model, optimizer, dynamic = started(run.case)
    dynamic.load_state_dict(state)
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(optimizer_state)
    train(run.case, model, optimizer, dynamic, range(KEPT + 1, STEPS + 1), lambda step: None)
    assert dynamic.ranks == run.dynamic.ranks
    whole, resumed = trained_weights(run.model), trained_weights(model)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_every_layer_with_an_effect_shows_its_inputs(run):
    layers = run.dynamic.history[-1].layers
    unseen = {name for name, layer in layers.items() if layer.effective_rank is None}
    # nn.MultiheadAttention reads the weight of its output layer itself.
    assert unseen <= {"vision_model.head.attention.out_proj"}
