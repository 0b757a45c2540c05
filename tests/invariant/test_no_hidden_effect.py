"""Invariant 7: nothing changes but the ranks: not the loss, not the randomness, not the run."""

import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.models import adamw, attached, lora_llama, loss_of, sequences, train
from tests.processes import run_in_group


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("dropout", [0.1])
def test_uniform_importance_is_bit_identical_to_plain_peft_random_state_included(dropout):
    runs = {}
    for with_dynamic in (False, True):
        model = lora_llama(lora_dropout=dropout)
        torch.manual_seed(7)
        optimizer = adamw(model)
        dynamic = (
            attached(model, optimizer, importance="uniform", fused=False, total_steps=40)
            if with_dynamic
            else None
        )
        losses = train(model, optimizer, dynamic, 40)
        runs[with_dynamic] = (losses, lora_weights(model), torch.get_rng_state())
    assert runs[True][0] == runs[False][0]
    assert all(torch.equal(w, runs[False][1][name]) for name, w in runs[True][1].items())
    assert torch.equal(runs[True][2], runs[False][2])


@pytest.mark.parametrize("dropout", [0.1])
def test_fused_a_run_is_plain_peft_up_to_rounding(dropout):
    runs = {}
    for with_dynamic in (False, True):
        model = lora_llama(lora_dropout=dropout).double()
        torch.manual_seed(7)
        optimizer = adamw(model)
        dynamic = (
            attached(model, optimizer, importance="uniform", total_steps=40)
            if with_dynamic
            else None
        )
        losses = train(model, optimizer, dynamic, 40)
        runs[with_dynamic] = (losses, lora_weights(model), torch.get_rng_state())
    assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-6)
    for name, weight in runs[True][1].items():
        torch.testing.assert_close(weight, runs[False][1][name], rtol=0, atol=1e-6)
    assert torch.equal(runs[True][2], runs[False][2])


def test_the_models_loss_is_the_tasks_loss_in_training_and_evaluation(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, total_steps=40, hysteresis=0)
    train(tiny_llama, optimizer, dynamic, 25)
    tokens = next(sequences())
    for mode in (True, False):
        tiny_llama.train(mode)
        outputs = tiny_llama(input_ids=tokens, labels=tokens)
        expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)


def test_logging_changes_nothing(caplog):
    runs = []
    for level in ("DEBUG", "CRITICAL"):
        caplog.set_level(level, logger="dynlora")
        model = lora_llama()
        optimizer = adamw(model)
        dynamic = attached(model, optimizer, total_steps=30, hysteresis=0)
        train(model, optimizer, dynamic, 30)
        runs.append(lora_weights(model))
    assert all(torch.equal(w, runs[1][name]) for name, w in runs[0].items())


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


def test_closing_removes_every_hook(tiny_llama):
    def hooks():
        return sum(
            len(m._forward_hooks)
            + len(m._forward_pre_hooks)
            + len(m._backward_hooks)
            + ("forward" in vars(m))
            for m in tiny_llama.modules()
        )

    before = hooks()
    dynamic = attached(tiny_llama, adamw(tiny_llama), total_steps=100)
    assert hooks() > before
    dynamic.close()
    assert hooks() == before


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
