"""`dynlora diff`: figures of two adapters equal those of their dense updates."""

import pytest
import torch

from dynlora.cli.main import main
from tests.adapters import randomised, save_adapter, save_classifier_adapter
from tests.jobs import missing, save_model

PATTERNS = {"rank_pattern": {}, "alpha_pattern": {"down_proj": 0.5}}
FIRST = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SECOND = {"target_modules": ["q_proj", "down_proj", "gate_proj"], "lora_alpha": -3}


@pytest.fixture
def pair(tmp_path):
    """Return two models with adapters of unequal ranks, layers and signs, saved as `a` and `b`."""
    first = save_adapter(tmp_path / "a", "rslora", target_modules=FIRST)
    second = save_adapter(tmp_path / "b", "rslora", **SECOND, **PATTERNS)
    randomised(second, seed=2).save_pretrained(tmp_path / "b")
    return first, second


def dense(model, name):
    """Return the dense update of a layer, flat zeros of no layer."""
    module = model.base_model.model.get_submodule(name)
    if not hasattr(module, "get_delta_weight"):
        return torch.zeros(module.weight.shape).double()
    return module.get_delta_weight("default").detach().double()


def share(update, outputs):
    """Return the share of an update's energy in the column space of another."""
    rank = int(torch.linalg.matrix_rank(outputs, rtol=1e-5))
    Q = torch.linalg.svd(outputs).U[:, :rank]
    return float((Q @ (Q.T @ update)).square().sum() / update.square().sum())


def test_figures_equal_those_of_the_dense_updates(pair, tmp_path, said):
    found = said("diff", tmp_path / "a", tmp_path / "b")
    updates = {
        row["name"]: [dense(model, row["name"]) for model in pair] for row in found["layers"]
    }
    assert len(updates) == 14
    for row in found["layers"]:
        one, other = updates[row["name"]]
        assert row["norm"] == pytest.approx([float(one.norm()), float(other.norm())], rel=1e-5)
        if 0 in row["rank"]:
            assert row["cosine"] is None
            assert row["inside"] == (None if row["rank"][1] == 0 else 0)
            continue
        cosine = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-6)
        assert row["inside"] == pytest.approx(share(other, one), rel=1e-5)
    one, other = (torch.cat([pair[side].flatten() for pair in updates.values()]) for side in (0, 1))
    total = found["total"]
    assert total["norm"] == pytest.approx([float(one.norm()), float(other.norm())], rel=1e-5)
    cosine = float(torch.cosine_similarity(one, other, dim=0))
    assert total["cosine"] == pytest.approx(cosine, abs=1e-6)
    inside = sum(row["norm"][1] ** 2 * (row["inside"] or 0) for row in found["layers"])
    assert total["inside"] == pytest.approx(inside / float(other.norm()) ** 2, rel=1e-5)
    trainable = [model.get_nb_trainable_parameters()[0] for model in pair]
    assert total["parameters"] == trainable


@pytest.mark.usefixtures("pair")
def test_the_table_ends_with_all_layers_and_counts_those_of_one_adapter(tmp_path, capsys):
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    table = " ".join(capsys.readouterr().out.split())
    told = "14 layers | 4 layers in both, 8 in A only, 2 in B only | gate_proj 0 | 4 | share of B's"
    assert missing(table, told) == []


def test_an_untrained_adapter_has_no_direction_and_equal_adapters_one(tmp_path, said):
    model = save_adapter(tmp_path / "a", "plain")
    same = said("diff", tmp_path / "a", tmp_path / "a")["total"]
    assert (same["cosine"], same["inside"]) == pytest.approx((1, 1))
    for name, weight in model.named_parameters():
        weight.data *= "lora_B" not in name
    model.save_pretrained(tmp_path / "b")
    total = said("diff", tmp_path / "a", tmp_path / "b")["total"]
    assert (total["norm"][1], total["cosine"], total["inside"]) == (0, None, None)
    assert said("diff", tmp_path / "b", tmp_path / "a")["total"]["inside"] == 0


def test_layers_of_other_widths_are_refused(adapter, tmp_path, refused):
    save_classifier_adapter(tmp_path / "other", save_model(tmp_path / "base", hidden=24))
    told = f"same shapes in layer 'bert.encoder | ((16,), (16,)) in {adapter} | 24"
    assert missing(refused("diff", adapter, tmp_path / "other"), told) == []
