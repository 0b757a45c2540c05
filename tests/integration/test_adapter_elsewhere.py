"""What is saved is a stock PEFT adapter: it loads, merges and serves without dynlora."""

import sys

import pytest
import torch

from tests.models import adamw, attached, bare_llama, lora_llama, sequences, train
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


@pytest.fixture(params=[{"layer_weights": True}, {"use_rslora": True}], ids=str)
def trained(request):
    settings = dict(request.param)
    rslora = settings.pop("use_rslora", False)
    model = lora_llama(r=8, use_rslora=rslora)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=60, hysteresis=0, **settings)
    train(model, optimizer, dynamic, 60)
    assert len(set(dynamic.ranks.values())) > 1
    return model.eval(), dynamic


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def test_a_process_without_dynlora_gives_the_same_logits(trained, tmp_path):
    model, _ = trained
    tokens = next(sequences(seed=5))
    bare_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(tokens, tmp_path / "tokens.pt")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "tokens.pt", "out.pt")]
    run_in_group([sys.executable, "-W", "ignore", "-c", ELSEWHERE, *paths], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model, tokens))


def test_merging_keeps_the_logits(trained):
    model, _ = trained
    tokens = next(sequences(seed=5))
    before = logits(model, tokens)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, tokens), before, atol=2e-5, rtol=1e-4)
