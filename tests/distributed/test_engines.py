"""Two processes under an engine: one run, as if one process had seen all batches.

In loops of one's own: DistributedDataParallel, FSDP2 (`fully_shard`), both from Accelerate too, and
DeepSpeed's ZeRO.
"""

from functools import cache

import pytest
import torch
from peft import PeftModel

from dynlora.integrations.checkpoint import load_state
from tests.distributed.launch import NEEDS_DEEPSPEED, run_in_processes
from tests.distributed.scenarios import (
    COMPILED,
    ENGINES,
    EXPERTS,
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    alone,
    bare_model,
    base_norms,
    batches,
    differing,
    lora_weights,
    model_in_float64,
)
from tests.models import train

ZERO = [pytest.param(f"zero{stage}", marks=NEEDS_DEEPSPEED) for stage in (1, 2, 3)]


@pytest.fixture(scope="module", params=[*ENGINES, *ZERO])
def engine(request):
    return request.param


@pytest.fixture(scope="module")
def folder(engine, request, tmp_path_factory):
    """Return the folder that the processes under an engine have written to."""
    if engine in ENGINES:
        return request.getfixturevalue("processes") / engine
    out = tmp_path_factory.mktemp(engine)
    run_in_processes("tests.distributed.zero_worker", engine[-1], out)
    return out


@pytest.fixture(scope="module")
def found(engine, folder):
    """Return by scenario what each process found."""
    return {name: read(folder, name) for name in ENGINES.get(engine, (*SCENARIOS, EXPERTS))}


def read(folder, name):
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def test_every_process_has_the_same_ranks_and_the_same_weights_to_the_last_bit(found):
    for first, second in found.values():
        assert len(set(first["ranks"].values())) > 1
        assert first["history"] == second["history"]
        assert first["weights"].keys() == second["weights"].keys()
        for step, ours in first["weights"].items():
            assert differing(ours, second["weights"][step]) == []


def first_scores(history):
    """Return the score of each layer at the first event that had any."""
    events = ({n: layer["score"] for n, layer in event["layers"].items()} for event in history)
    return next(scores for scores in events if None not in scores.values())


@cache
def found_alone(importance):
    """Return what one process finds with the whole batches, and its weights by step."""
    dynamic, model, optimizer = alone(importance)
    seen = {}
    train(
        model,
        optimizer,
        dynamic,
        STEPS,
        batches=batches(0, STEPS),
        after=lambda step: seen.update({step: lora_weights(model)}),
    )
    return dynamic.ranks, [event.to_dict() for event in dynamic.history], seen


def test_ranks_and_weights_are_those_of_one_process_with_the_whole_batch(engine, found):
    """After every event; ZeRO too, although it trains float32 copies of these weights of float64.

    There the layers of a block tie at the one score of its attention, and the copies may tip it.
    """
    for importance, (first, _) in found.items():
        ranks, history, seen = found_alone(importance)
        assert first_scores(first["history"]) == pytest.approx(first_scores(history), rel=1e-5)
        if engine not in ENGINES and importance == "attention_entropy":
            continue
        assert first["ranks"] == ranks
        for step, ours in first["weights"].items():
            for name, value in seen[step].items():
                assert torch.allclose(ours[name], value, rtol=0, atol=1e-6), name


def test_frozen_weights_are_read_whole(found):
    """Of which some engines keep a part on each process."""
    for scenario, (first, second) in found.items():
        assert first["base_norms"] == second["base_norms"] == base_norms(model_in_float64(scenario))


def test_training_goes_on_in_every_layer_after_an_event(found):
    """Gradients are still reduced, and reach what was grown."""
    for first, _ in found.values():
        after, last = (first["weights"][step] for step in (first["history"][0]["step"], STEPS))
        assert all(not torch.equal(after[n], last[n]) for n in after)


def test_a_resumed_run_ends_bit_for_bit_the_same(folder, found):
    """Under DDP in the same wrapper; with Accelerate's, attached before it instead of after it."""
    for importance, whole in found.items():
        for ours, resumed in zip(whole, read(folder, f"{importance}-resumed"), strict=True):
            assert resumed["history"] == ours["history"]
            assert differing(resumed["weights"][STEPS], ours["weights"][STEPS]) == []


@pytest.mark.parametrize("engine", ENGINES, scope="module", indirect=True)
def test_one_process_goes_on_where_two_left_off_at_the_same_ranks(folder, found):
    """Not with DeepSpeed, whose checkpoints are for as many processes as wrote them."""
    for importance, (first, _) in found.items():
        dynamic, model, optimizer = alone(importance)
        checkpoint = folder / f"{importance}-checkpoint"
        dynamic.load_state_dict(load_state(checkpoint))
        model.load_state_dict(torch.load(checkpoint / "model.pt"))
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt"))
        rest = STEPS - RESUMED_AT
        train(model, optimizer, dynamic, rest, batches=batches(RESUMED_AT, STEPS))
        assert dynamic.ranks == first["ranks"]
        for name, value in lora_weights(model).items():
            assert torch.allclose(first["weights"][STEPS][name], value, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    "engine", ["fsdp2", "accelerate_fsdp2", *ZERO], scope="module", indirect=True
)
def test_each_process_holds_as_many_bytes_as_with_plain_lora(engine, folder, found, request):
    """Weights, gradients and moments, mean over the run, against LoRA of this budget there."""
    plain_in = request.getfixturevalue("processes") if engine in ENGINES else folder
    for importance, places in found.items():
        for ours, plain in zip(places, read(plain_in, "bytes"), strict=True):
            assert ours["bytes"] <= 1.10 * plain.get(importance, plain["signal"]), importance


def test_parameters_stay_the_objects_that_the_users_optimizer_trains(found):
    assert all(place["same_parameters"] for places in found.values() for place in places)


# PEFT 0.21 says of patterns of parameters that they match nothing, and applies them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did:RuntimeWarning")
def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found):
    for importance, (first, _) in found.items():
        loaded = PeftModel.from_pretrained(bare_model(importance), folder / f"{importance}-adapter")
        assert differing(lora_weights(loaded.double()), first["weights"][STEPS]) == []


def test_a_model_that_is_called_without_its_wrapper_is_refused_by_its_gradients(processes):
    """Each process would train a model of its own."""
    for refusal in read(processes, "refusal"):
        assert "Gradients must be the same on all 2 processes" in refusal


def moves(found):
    """Return the ranks after each event; figures of inputs differ if a sampled step is missed."""
    return [
        (event["step"], {name: layer["rank_after"] for name, layer in event["layers"].items()})
        for event in found["history"]
    ]


def test_compiled_models_train_as_others_under_ddp_in_every_order(processes):
    plain, _ = read(processes, COMPILED[0])
    assert len(set(plain["ranks"].values())) > 1
    for order in COMPILED:
        for ours in read(processes, order):
            assert moves(ours) == moves(plain), order
            assert differing(ours["weights"], plain["weights"]) == [], order


def test_all_processes_take_over_the_plan_and_the_new_directions_of_the_first(processes):
    first, second = read(processes, "unlike")
    assert len(set(first["ranks"].values())) > 1  # the second would have left them equal
    assert second["ranks"] == first["ranks"]
    assert differing(second["weights"], first["weights"]) == []
