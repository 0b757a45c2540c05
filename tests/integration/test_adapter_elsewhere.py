"""What is saved is a stock PEFT adapter: it loads, merges, serves and, once uniform, swaps."""

import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from dynlora.cli.main import main
from dynlora.types import RankPlan
from tests.adapters import outputs, randomised
from tests.models import adamw, attached, bare_llama, lora_llama, sequences, trained
from tests.processes import run_in_group

ELSEWHERE = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "dynlora":
            raise ImportError("dynlora is not installed here")
sys.meta_path.insert(0, Blocked())
try:
    import dynlora
except ImportError:
    pass
else:
    raise SystemExit("dynlora could be imported")
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, tokens, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.load(tokens)).logits, out)
"""


@torch.no_grad()
def test_a_process_without_dynlora_and_a_merged_model_give_the_same_logits(tmp_path):
    model = lora_llama(r=8, use_rslora=True)
    with torch.enable_grad():
        _, dynamic = trained(model, 40, total_steps=40, hysteresis=0, layer_weights=True)
    assert len(set(dynamic.ranks.values())) > 1
    assert len({layer.weight for layer in dynamic._layers}) > 1
    model.eval()
    tokens = next(sequences(seed=5))
    expected = model(input_ids=tokens).logits
    bare_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "tokens.pt", "out.pt")]
    run_in_group([sys.executable, "-W", "ignore", "-c", ELSEWHERE, *paths], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    merged = model.merge_and_unload()(input_ids=tokens).logits
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=1e-4)


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
