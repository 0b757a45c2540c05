"""What is saved is a stock PEFT adapter: it loads, merges and serves without dynlora."""

import sys

import torch

from tests.models import bare_llama, lora_llama, sequences, trained
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
