"""Invariant 7: nothing changes but the ranks: not the loss, not the randomness, not the run."""

import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.models import adamw, attached, lora_llama, loss_of, sequences, train, trained
from tests.processes import run_in_group


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("fused", [False, True])
def test_uniform_importance_is_plain_peft_random_state_included(fused):
    """Bit for bit, and up to the rounding of float64 if fused."""
    runs = []
    for with_dynamic in (False, True):
        model = lora_llama(lora_dropout=0.1)
        model = model.double() if fused else model
        torch.manual_seed(7)
        optimizer, dynamic = adamw(model), None
        if with_dynamic:
            settings = {"importance": "uniform", "fused": fused, "total_steps": 40}
            dynamic = attached(model, optimizer, **settings)
        losses = train(model, optimizer, dynamic, 40)
        runs.append((losses, lora_weights(model), torch.get_rng_state()))
    (losses, weights, state), (its_losses, its_weights, its_state) = runs
    assert its_losses == (pytest.approx(losses, rel=1e-6) if fused else losses)
    tolerance = 1e-6 if fused else 0
    for name, weight in its_weights.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=tolerance)
    assert torch.equal(state, its_state)


def test_the_models_loss_is_the_tasks_loss_in_training_and_evaluation(tiny_llama):
    _, dynamic = trained(tiny_llama, 25, total_steps=40, hysteresis=0)
    assert dynamic.history
    tokens = next(sequences())
    for mode in (True, False):
        tiny_llama.train(mode)
        outputs = tiny_llama(input_ids=tokens, labels=tokens)
        expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)


def test_forwards_in_eval_mode_or_without_gradients_are_never_observed(tiny_llama):
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=100)
    tokens = next(sequences())
    with torch.no_grad():
        loss_of(tiny_llama, tokens)
    tiny_llama.eval()
    loss_of(tiny_llama, tokens)
    assert dynamic._analyzer.stats() == {}
    tiny_llama.train()
    loss_of(tiny_llama, tokens)
    assert len(dynamic._analyzer.stats()) == len(dynamic.ranks)


def test_importing_dynlora_changes_nothing_in_torch_transformers_or_peft():
    script = """
import logging, random, warnings
import numpy, peft, torch, transformers
def state():
    modules = (torch.nn, torch.nn.functional, torch.optim, transformers, peft,
               torch.nn.Module, torch.nn.Linear, torch.nn.Parameter, peft.tuners.lora.Linear,
               transformers.Trainer, torch.optim.AdamW, torch.optim.Optimizer)
    found = {(m.__name__, k): id(v) for m in modules for k, v in vars(m).items()
             if k not in ("__builtins__", "__annotations_cache__")}
    return (found, torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), list(warnings.filters),
            str(numpy.random.get_state()), logging.root.handlers[:], logging.root.level)
for name in ("Trainer", "TrainerCallback", "TrainerControl", "TrainerState", "TrainingArguments"):
    getattr(transformers, name)
before = state()
from dynlora import *
after = state()
changed = [k for k, v in before[0].items() if after[0].get(k) != v]
assert not changed, changed
assert before[1:] == after[1:]
"""
    run_in_group([sys.executable, "-W", "ignore", "-c", script], check=True)
