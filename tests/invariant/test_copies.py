"""A copy or a pickle of a model that is being trained, taken at any step, is a model of its own."""

import copy
import gc
import pickle

import pytest
import torch
from torch.optim import Optimizer

from dynlora import RankPlan
from tests.models import adamw, attached, lora_llama, loss_of, sequences, train, trained

WAYS = {"copied": copy.deepcopy, "pickled": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("pickled", {"importance": "signal"}),
        ("copied", {"importance": "attention_entropy"}),
        ("pickled", {"input_adaptive": True}),
    ],
    ids=str,
)
def test_it_can_be_taken_before_every_step_and_gives_the_same_outputs(way, settings):
    model = lora_llama(r=8)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=24, **settings)
    first, second, *_ = dynamic.ranks
    batch = next(sequences(batch=2))

    def check(step):
        if step == 4:
            dynamic.apply(RankPlan(step=step, ranks={first: 5, second: 10}))
        other = WAYS[way](model)
        with torch.no_grad():
            expected = model.eval()(input_ids=batch).logits
            assert torch.equal(other.eval()(input_ids=batch).logits, expected)
        model.train()

    check(0)
    train(model, optimizer, dynamic, 12, after=check)


def optimizers():
    """Return which there are, told by type: some objects warn who asks for their class."""
    gc.collect()
    return {id(found) for found in gc.get_objects() if issubclass(type(found), Optimizer)}


@pytest.mark.parametrize("way", WAYS)
def test_of_what_trains_it_nothing_comes_along(way):
    model = lora_llama()
    _, dynamic = trained(model, 8, total_steps=24, input_adaptive=True)
    before = optimizers()
    other = WAYS[way](model)
    assert optimizers() == before
    assert other is not model
    assert dynamic.input_adaptive is not None


@pytest.mark.parametrize("way", WAYS)
def test_what_it_reads_in_training_is_not_shown_to_the_originals_controller(way):
    model = lora_llama()
    dynamic = attached(model, adamw(model), total_steps=24)
    loss_of(WAYS[way](model).train(), next(sequences(batch=2))).backward()
    assert not dynamic._analyzer.stats()
    loss_of(model, next(sequences(batch=2))).backward()
    assert dynamic._analyzer.stats()
