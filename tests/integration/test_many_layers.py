"""Adapters of many layers with moved ranks: stock PEFT loads them about as fast as uniform ones."""

import time

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dynlora.types import RankPlan
from tests.models import adamw, attached


def many_layers(blocks: int) -> nn.Module:
    """Return tiny linear layers with names as in a large language model, seven per block."""
    leaves = [f"{leaf}_proj" for leaf in ("q", "k", "v", "o", "gate", "up", "down")]
    layers = [nn.ModuleDict({leaf: nn.Linear(8, 8) for leaf in leaves}) for _ in range(blocks)]
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(layers)})})


def save_moved(blocks: int, folder) -> dict[str, int]:
    """Save one adapter with uniform ranks and one with moved ranks; return the latter's ranks."""
    model = get_peft_model(many_layers(blocks), LoraConfig(r=4, target_modules=r".*_proj"))
    model.save_pretrained(folder / "uniform")
    dynamic = attached(model, adamw(model), total_steps=100)
    dynamic.apply(RankPlan(step=0, ranks={n: 1 + i % 4 for i, n in enumerate(dynamic.ranks)}))
    model.save_pretrained(folder / "moved")
    return dynamic.ranks


def ranks_of(model: nn.Module) -> dict[str, int]:
    """Return the rank of every layer as PEFT built it."""
    layers = model.base_model.model.named_modules()
    return {name: layer.r["default"] for name, layer in layers if name.endswith("_proj")}


def test_peft_builds_the_ranks_of_560_layers(tmp_path):
    ranks = save_moved(80, tmp_path)
    loaded = PeftModel.from_pretrained(many_layers(80), tmp_path / "moved")
    assert len(ranks) == 560
    assert ranks_of(loaded) == ranks
    config = loaded.peft_config["default"]
    assert len({*config.rank_pattern, *config.alpha_pattern}) < 50


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [80, 343])
def test_peft_loads_moved_ranks_in_half_as_long_again_as_uniform_ones(blocks, tmp_path):
    ranks = save_moved(blocks, tmp_path)
    seconds = {}
    for kind in ("uniform", "moved"):
        base = many_layers(blocks)
        start = time.process_time()
        loaded = PeftModel.from_pretrained(base, tmp_path / kind)
        seconds[kind] = time.process_time() - start
    assert ranks_of(loaded) == ranks
    assert seconds["moved"] < 1.5 * seconds["uniform"]
