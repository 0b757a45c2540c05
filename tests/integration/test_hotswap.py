"""PEFT's hotswap: it refuses adapters with moved ranks, and swaps them once they are uniform."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from dynlora.cli.main import main
from dynlora.types import RankPlan
from tests.adapters import outputs, randomised
from tests.models import adamw, attached, bare_llama


def save_moved(folder, ranks):
    """Save a random adapter with these ranks and return the model."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = randomised(get_peft_model(bare_llama(), lora), seed=sum(ranks)).train()
    dynamic = attached(model, adamw(model), total_steps=100)
    dynamic.apply(RankPlan(step=0, ranks=dict(zip(dynamic.ranks, ranks, strict=True))))
    model.save_pretrained(folder)
    return model.eval()


def test_moved_adapters_are_swapped_once_they_are_uniform(tmp_path):
    save_moved(tmp_path / "first", [3, 5, 3, 4])
    wanted = outputs(save_moved(tmp_path / "second", [2, 6, 4, 4]))
    served = PeftModel.from_pretrained(bare_llama(), tmp_path / "first")
    with pytest.raises(ValueError, match="incompatible: for alpha_pattern"):
        hotswap_adapter(served, str(tmp_path / "second"), adapter_name="default")

    for name in ("first", "second"):
        uniform = str(tmp_path / f"uniform-{name}")
        given = ["export", str(tmp_path / name), "--format", "uniform", "--rank", "8"]
        assert main([*given, "--output", uniform]) == 0
    served = PeftModel.from_pretrained(bare_llama(), tmp_path / "uniform-first").eval()
    hotswap_adapter(served, str(tmp_path / "uniform-second"), adapter_name="default")
    torch.testing.assert_close(outputs(served), wanted)
