"""`transformers.Trainer` in two processes, with nothing but the callback: one run, and resumed."""

import pytest
import torch
from peft import PeftModel

from tests.distributed.launch import NEEDS_DEEPSPEED, run_in_processes
from tests.distributed.scenarios import STEPS, differing, lora_weights
from tests.integration.test_trainer import trainer_of
from tests.models import bare_llama, lora_llama

RANKS = (0, 1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("trainer_worker",), id="ddp"),
        pytest.param(("zero_trainer_worker", 1), id="zero1", marks=NEEDS_DEEPSPEED),
        pytest.param(("zero_trainer_worker", 2), id="zero2", marks=NEEDS_DEEPSPEED),
    ],
)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    worker, *stage = request.param
    run_in_processes(f"tests.distributed.{worker}", *stage, out)
    return out


@pytest.fixture
def found(folder):
    """Return by rank what each process found."""
    return [torch.load(folder / f"whole-{rank}.pt") for rank in RANKS]


def test_every_process_has_the_same_ranks_and_the_same_weights_to_the_last_bit(found):
    first, second = found
    assert first["mode"] == "static"
    assert len(set(first["ranks"].values())) > 1
    assert first["history"] == second["history"]
    assert differing(first["weights"], second["weights"]) == []


def test_ranks_and_weights_are_those_of_one_process_with_the_same_global_batch(found, tmp_path):
    model = lora_llama(r=8).double()
    trainer, callback = trainer_of(model, tmp_path, steps=STEPS)
    trainer.train()
    assert callback.dynamic.mode == "physical"
    assert found[0]["ranks"] == callback.dynamic.ranks
    for name, value in lora_weights(model).items():
        assert torch.allclose(found[0]["weights"][name], value, rtol=0, atol=1e-6), name


def test_a_resumed_run_ends_bit_for_bit_the_same(folder, found):
    for rank in RANKS:
        resumed = torch.load(folder / f"resumed-{rank}.pt")
        assert resumed["history"] == found[rank]["history"]
        assert differing(resumed["weights"], found[rank]["weights"]) == []


def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found):
    loaded = PeftModel.from_pretrained(bare_llama().double(), folder / "whole-adapter")
    weights = {k: v for k, v in loaded.double().state_dict().items() if "lora_" in k}
    assert differing(weights, found[0]["weights"]) == []
