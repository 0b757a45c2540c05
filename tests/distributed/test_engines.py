"""Two processes under an engine: one run, as if one process had seen all batches.

In loops of one's own: DistributedDataParallel, FSDP2 (`fully_shard`), that from Accelerate, and
DeepSpeed's ZeRO.
"""

import pytest
import torch
from peft import PeftModel

from dynlora.integrations.checkpoint import load_state
from tests.distributed.launch import NEEDS_DEEPSPEED, run_in_processes
from tests.distributed.scenarios import (
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    alone,
    base_norms,
    batches,
    differing,
    lora_weights,
    model_in_float64,
)
from tests.models import bare_llama, train

RANKS = (0, 1)


TORCH_ENGINES = ("ddp", "fsdp2", "accelerate_fsdp2")


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param(("worker", engine), id=engine) for engine in TORCH_ENGINES),
        *(
            pytest.param(("zero_worker", stage), id=f"zero{stage}", marks=NEEDS_DEEPSPEED)
            for stage in (1, 2, 3)
        ),
    ],
)
def engine(request):
    """Return what its processes run: a module, and what of it."""
    return request.param


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    """Return the folder that the processes of all scenarios have written to."""
    worker, kind = engine
    out = tmp_path_factory.mktemp(f"{worker}-{kind}")
    run_in_processes(f"tests.distributed.{worker}", kind, out)
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


def first_scores(history):
    """Return the score of each layer at the first event that had any."""
    events = ({n: layer["score"] for n, layer in event["layers"].items()} for event in history)
    return next(scores for scores in events if None not in scores.values())


def test_ranks_and_weights_are_those_of_one_process_with_the_whole_batch(engine, found, importance):
    """After every step; ZeRO too, although it trains float32 copies of these weights of float64."""
    dynamic, model, optimizer = alone(importance)
    seen = []
    train(
        model,
        optimizer,
        dynamic,
        STEPS,
        batches=batches(0, STEPS),
        after=lambda step: seen.append(lora_weights(model)),
    )
    history = [event.to_dict() for event in dynamic.history]
    assert first_scores(found[0]["history"]) == pytest.approx(first_scores(history), rel=1e-5)
    if engine[0] == "zero_worker" and importance == "attention_entropy":
        pytest.skip("one score for a block is a tie of its layers, which float32 copies may tip")
    assert found[0]["ranks"] == dynamic.ranks
    for ours, theirs in zip(found[0]["weights"], seen, strict=True):
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=0, atol=1e-6), name


def test_frozen_weights_are_read_whole(found):
    """Of which some engines keep a part on each process."""
    for process in found:
        assert process["base_norms"] == base_norms(model_in_float64())


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


def test_one_process_goes_on_where_two_left_off_at_the_same_ranks(
    engine, folder, found, importance
):
    if engine[0] != "worker":
        pytest.skip("DeepSpeed's checkpoints are for as many processes as wrote them")
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
