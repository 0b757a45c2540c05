"""Two processes under DeepSpeed's ZeRO: one run, as if one process had seen all batches."""

from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel

from tests.distributed.launch import run_in_processes
from tests.distributed.scenarios import (
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

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'dynlora[deepspeed]'"
)

RANKS = (0, 1)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda stage: f"zero{stage}")
def folder(request, tmp_path_factory):
    """Return the folder that the processes of all scenarios have written to."""
    out = tmp_path_factory.mktemp(f"zero{request.param}")
    run_in_processes("tests.distributed.zero_worker", request.param, out)
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
    """After every step, although ZeRO trains float32 copies of these weights of float64."""
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
    assert found[0]["ranks"] == dynamic.ranks
    for ours, theirs in zip(found[0]["weights"], seen, strict=True):
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=0, atol=1e-6), name


def test_frozen_weights_are_read_whole(found):
    """Of which stage 3 keeps a part on each process."""
    for process in found:
        assert process["base_norms"] == base_norms(model_in_float64())


def test_a_resumed_run_ends_bit_for_bit_the_same(folder, found, importance):
    for rank in RANKS:
        resumed = torch.load(folder / f"{importance}-resumed-{rank}.pt")
        assert resumed["history"] == found[rank]["history"]
        assert differing(resumed["weights"][-1], found[rank]["weights"][-1]) == []


def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found, importance):
    loaded = PeftModel.from_pretrained(bare_llama().double(), folder / f"{importance}-adapter")
    weights = {k: v for k, v in loaded.double().state_dict().items() if "lora_" in k}
    assert differing(weights, found[0]["weights"][-1]) == []
