"""`transformers.Trainer` in two processes, with nothing but the callback: one run, and resumed."""

import pytest
import torch
from peft import PeftModel

from tests.distributed.launch import NEEDS_DEEPSPEED, run_in_processes
from tests.distributed.scenarios import LOST_AT, STEPS, differing, lora_weights
from tests.integration.test_trainer import trainer_of
from tests.models import bare_llama, lora_llama

ZERO = [pytest.param(stage, id=f"zero{stage}", marks=NEEDS_DEEPSPEED) for stage in (1, 2, 3)]


@pytest.fixture(scope="module", params=["ddp", "fsdp2", *ZERO])
def folder(request, tmp_path_factory):
    if request.param == "ddp":
        return request.getfixturevalue("processes")
    if request.param == "fsdp2":
        return request.getfixturevalue("processes") / "trainer_fsdp2"
    out = tmp_path_factory.mktemp("trainer")
    run_in_processes("tests.distributed.zero_trainer_worker", request.param, out)
    return out


@pytest.fixture
def found(folder):
    """Return by rank what each process found."""
    return [torch.load(folder / f"whole-{rank}.pt") for rank in (0, 1)]


def test_every_process_has_the_same_ranks_and_the_same_weights_to_the_last_bit(found):
    first, second = found
    assert len(set(first["ranks"].values())) > 1
    assert first["history"] == second["history"]
    assert differing(first["weights"], second["weights"]) == []


def test_ranks_and_weights_are_those_of_one_process_with_the_same_global_batch(found, tmp_path):
    model = lora_llama(r=8).double()
    trainer, callback = trainer_of(model, tmp_path, steps=STEPS)
    trainer.train()
    assert found[0]["ranks"] == callback.dynamic.ranks
    for name, value in lora_weights(model).items():
        assert torch.allclose(found[0]["weights"][name], value, rtol=0, atol=1e-6), name


def test_a_run_that_lost_a_process_ends_bit_for_bit_the_same_once_resumed(folder, found):
    """Under FSDP2 and DeepSpeed from a checkpoint of the whole run."""
    steps = [event["step"] for event in found[0]["history"]]
    assert steps[0] < LOST_AT - 1
    assert steps[-1] > LOST_AT
    for rank, whole in enumerate(found):
        resumed = torch.load(folder / f"resumed-{rank}.pt")
        assert resumed["history"] == whole["history"]
        assert differing(resumed["weights"], whole["weights"]) == []


def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found):
    loaded = PeftModel.from_pretrained(bare_llama().double(), folder / "whole-adapter")
    assert differing(lora_weights(loaded.double()), found[0]["weights"]) == []
