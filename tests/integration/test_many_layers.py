"""Adapters of many layers with moved ranks: few keys, so that stock PEFT loads them fast."""

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dynlora.types import RankPlan
from tests.models import adamw, attached


def many_layers() -> nn.Module:
    """Return tiny linear layers with names as in a large language model, seven per block."""
    leaves = [f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")]
    layers = [nn.ModuleDict({leaf: nn.Linear(8, 8) for leaf in leaves}) for _ in range(80)]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})


def test_peft_builds_the_ranks_of_560_layers(tmp_path):
    model = get_peft_model(many_layers(), LoraConfig(r=4, target_modules=r".*_proj"))
    dynamic = attached(model, adamw(model), total_steps=100)
    ranks = {name: 1 + index % 4 for index, name in enumerate(dynamic.ranks)}
    assert len(ranks) == 560
    dynamic.apply(RankPlan(step=0, ranks=ranks))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(many_layers(), tmp_path)
    layers = loaded.base_model.model.named_modules()
    assert {n: layer.r["default"] for n, layer in layers if n.endswith("_proj")} == ranks
    config = loaded.peft_config["default"]
    assert len({*config.rank_pattern, *config.alpha_pattern}) < 50
