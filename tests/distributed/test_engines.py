"""Two processes under an engine: one run, as if one process had seen all batches.

In loops of one's own: DistributedDataParallel, FSDP2 (`fully_shard`), and that from Accelerate.
"""

import pytest
import torch
from peft import PeftModel

from dynlora.integrations.checkpoint import load_state
from tests.distributed.launch import run_in_processes
from tests.distributed.scenarios import (
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    alone,
    batches,
    differing,
    lora_weights,
)
from tests.models import bare_llama, train

RANKS = (0, 1)


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "accelerate_fsdp2"])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    """Return the folder that the processes of all scenarios have written to."""
    out = tmp_path_factory.mktemp(engine)
    run_in_processes("tests.distributed.worker", engine, out)
    return out


@pytest.fixture(params=SCENARIOS)
def importance(request):
    return request.param


@pytest.fixture
def found(folder, importance):
    """Return by rank what each process found."""
    return [torch.load(folder / f"{importance}-{rank}.pt") for rank in RANKS]


def test_every_process_has_the_same_ranks_and_the_same_weights_to_the_last_bit(found):
    first, second = found
    assert first["mode"] == second["mode"] == "static"
    assert len(set(first["ranks"].values())) > 1
    assert first["history"] == second["history"]
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert differing(ours, theirs) == []


def test_ranks_and_weights_are_those_of_one_process_with_the_whole_batch(found, importance):
    dynamic, model, optimizer = alone(importance)
    train(model, optimizer, dynamic, STEPS, batches=batches(0, STEPS))
    assert found[0]["ranks"] == dynamic.ranks
    for name, value in lora_weights(model).items():
        assert torch.allclose(found[0]["weights"][-1][name], value, rtol=0, atol=1e-6), name


def test_training_goes_on_in_every_layer_after_an_event(found):
    """Gradients are still reduced, and reach what was grown."""
    at = found[0]["history"][0]["step"]
    after, last = found[0]["weights"][at - 1], found[0]["weights"][-1]
    assert all(not torch.equal(after[n], last[n]) for n in after)


def test_a_resumed_run_ends_bit_for_bit_the_same(folder, found, importance):
    for rank in RANKS:
        resumed = torch.load(folder / f"{importance}-resumed-{rank}.pt")
        assert resumed["history"] == found[rank]["history"]
        assert differing(resumed["weights"][-1], found[rank]["weights"][-1]) == []


def test_one_process_goes_on_where_two_left_off_at_the_same_ranks(folder, found, importance):
    dynamic, model, optimizer = alone(importance)
    checkpoint = folder / f"{importance}-checkpoint"
    dynamic.load_state_dict(load_state(checkpoint))
    model.load_state_dict(torch.load(checkpoint / "model.pt"))
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt"))
    rest = STEPS - RESUMED_AT
    train(model, optimizer, dynamic, rest, batches=batches(RESUMED_AT, STEPS))
    assert dynamic.ranks == found[0]["ranks"]
    for name, value in lora_weights(model).items():
        assert torch.allclose(found[0]["weights"][-1][name], value, rtol=0, atol=1e-6), name


def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found, importance):
    loaded = PeftModel.from_pretrained(bare_llama().double(), folder / f"{importance}-adapter")
    weights = {k: v for k, v in loaded.double().state_dict().items() if "lora_" in k}
    assert differing(weights, found[0]["weights"][-1]) == []


def test_a_model_that_was_wrapped_before_it_was_attached_is_refused_by_its_gradients():
    """Its reducer would not see the tensors: each process would train a model of its own."""
    with pytest.raises(AssertionError, match="Gradients must be the same on all 2 processes"):
        run_in_processes("tests.distributed.wrapped_first")
