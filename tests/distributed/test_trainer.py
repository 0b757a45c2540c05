"""`transformers.Trainer` in two processes, with nothing but the callback; and one of them lost."""

import pytest
import torch
from peft import PeftModel

from tests.distributed.launch import end_in_processes, run_in_processes
from tests.distributed.scenarios import STEPS, differing, lora_weights
from tests.integration.test_trainer import trainer_of
from tests.models import bare_llama, lora_llama

RANKS = (0, 1)
KILLED_AT = 9
"""Between two events, and one step after a checkpoint."""
WORKER = "tests.distributed.trainer_worker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer")
    run_in_processes(WORKER, out)
    return out


@pytest.fixture
def found(folder):
    """Return by rank what each process found."""
    return found_in(folder)


def found_in(folder):
    return [torch.load(folder / f"found-{rank}.pt") for rank in RANKS]


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


def test_a_run_that_loses_a_process_ends_bit_for_bit_the_same_once_resumed(found, tmp_path):
    lost = end_in_processes(WORKER, tmp_path, KILLED_AT)
    assert lost.returncode != 0
    assert "SIGKILL" in lost.stderr
    assert not (tmp_path / "found-0.pt").exists()
    run_in_processes(WORKER, tmp_path)
    for resumed, whole in zip(found_in(tmp_path), found, strict=True):
        assert resumed["history"] == whole["history"]
        assert differing(resumed["weights"], whole["weights"]) == []


def test_the_saved_adapter_loads_in_plain_peft_at_the_live_ranks(folder, found):
    loaded = PeftModel.from_pretrained(bare_llama().double(), folder / "adapter")
    weights = {k: v for k, v in loaded.double().state_dict().items() if "lora_" in k}
    assert differing(weights, found[0]["weights"]) == []
