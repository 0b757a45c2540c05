"""Ways to begin an adapter: PEFT loads it with any ranks, whichever way it began."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynlora.types import RankPlan
from tests.adapters import outputs
from tests.models import adamw, attached, bare_llama, train


@pytest.mark.filterwarnings("ignore:.*EVA config", "ignore:lora with eva")
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_peft_loads_moved_ranks_after_any_start(start, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    model = get_peft_model(bare_llama(), lora)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=100)
    train(model, optimizer, dynamic, 2)
    ranks = dict(zip(dynamic.ranks, [3, 5, 3, 4], strict=True))
    dynamic.apply(RankPlan(step=2, ranks=ranks))
    train(model, optimizer, dynamic, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))
    assert lora.init_lora_weights == start
