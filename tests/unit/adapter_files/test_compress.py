"""Cutting layers and adapters: dense SVDs and brute force over all ranks are the oracles."""

import itertools
import math

import pytest
import torch

from dynlora.adapter_files.adapter import read_adapter, write_adapter
from dynlora.adapter_files.compress import compress
from dynlora.adapter_files.layer import SavedLayer, Seen, find_components
from dynlora.errors import BudgetError
from tests.adapters import load_adapter, outputs, save_adapter

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def make_layer(*, r=6, outputs=12, scaling=1.5, use_rslora=False):
    generator = torch.Generator().manual_seed(0)
    divisor = math.sqrt(r) if use_rslora else r
    return SavedLayer(
        name="model.q_proj",
        key_A="A",
        key_B="B",
        lora_A=torch.randn(r, 20, generator=generator),
        lora_B=torch.randn(outputs, r, generator=generator),
        lora_alpha=scaling * divisor,
        use_rslora=use_rslora,
    )


def dense(layer):
    return layer.scaling * layer.B.double() @ layer.A.double()


def best(update, rank):
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize(
    ("rank", "use_rslora", "scaling"),
    [(1, False, 1.5), (2, True, -0.25), (6, True, 1.5), (9, False, 1.5)],
)
def test_a_cut_is_the_best_update_of_its_rank(rank, use_rslora, scaling):
    layer = make_layer(use_rslora=use_rslora, scaling=scaling)
    parts = find_components(layer)
    torch.testing.assert_close(parts.values, torch.linalg.svdvals(dense(layer))[:6], **TOLERANCE)
    cut = parts.cut(rank)
    assert cut.r == min(rank, 6)
    torch.testing.assert_close(dense(cut), best(dense(layer), rank), **TOLERANCE)
    if rank < 6:  # balanced, so that half precision can represent both factors
        torch.testing.assert_close(cut.A.norm(dim=1), cut.B.norm(dim=0))


def test_no_more_ranks_are_kept_than_the_update_has_directions():
    assert len(find_components(make_layer(r=6, outputs=4)).values) == 4
    twin = make_layer(r=6)
    twin.lora_B[:, 3:] = twin.lora_B[:, :3]
    parts = find_components(twin)
    assert len(parts.values) == 3
    torch.testing.assert_close(dense(parts.cut(6)), dense(twin), **TOLERANCE)


@pytest.mark.parametrize(("scaling", "trained"), [(1.5, False), (0.0, True), (1e-308, True)])
def test_a_layer_without_energy_keeps_a_row_that_can_be_trained(scaling, trained):
    layer = make_layer(scaling=scaling)
    layer.lora_B.mul_(trained)
    parts = find_components(layer)
    assert (parts.energies, parts.energy, parts.effective_rank, parts.kept(1)) == ([], 0, 0, 1)
    cut = parts.cut(4)
    assert torch.equal(cut.A, layer.A[:1])
    assert not cut.B.any()


FEW = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {}, "r": 3}


@pytest.fixture
def few(tmp_path):
    """Return an adapter of four layers of two shapes, of rank 3."""
    save_adapter(tmp_path, "plain", **FEW)
    adapter = read_adapter(tmp_path)
    for place, layer in enumerate(adapter.layers):
        layer.lora_B.mul_(1 + place)
    return adapter


def lost(adapter, ranks):
    """Return the energy that dense truncated SVDs of these ranks lose."""
    return sum(
        float(torch.linalg.svdvals(dense(layer))[rank:].square().sum())
        for layer, rank in zip(adapter.layers, ranks, strict=True)
    )


@pytest.mark.parametrize("part", [0.35, 0.6])
def test_no_ranks_of_the_same_cost_keep_more_energy(few, part):
    made = compress(few, int(part * few.parameters))
    ranks = [layer.rank_after for layer in made.layers]
    spent = sum(rank * layer.cost for rank, layer in zip(ranks, few.layers, strict=True))
    assert spent == made.adapter.parameters <= made.budget
    others = [
        other
        for other in itertools.product(range(1, 4), repeat=len(ranks))
        if sum(r * layer.cost for r, layer in zip(other, few.layers, strict=True)) <= spent
    ]
    least = min(lost(few, other) for other in others)
    assert lost(few, ranks) == pytest.approx(least, rel=1e-6)
    for before, after, cut in zip(few.layers, made.adapter.layers, made.layers, strict=True):
        k, squares = cut.rank_after, torch.linalg.svdvals(dense(before)).square()
        torch.testing.assert_close(dense(after), best(dense(before), k), rtol=1e-6, atol=1e-7)
        kept = float(squares[:k].sum() / squares.sum())
        assert cut.energy_kept == pytest.approx(kept, rel=1e-6)
        assert cut.output_lost is None


def see(adapter, *, power=1.0, tokens=500):
    """Return what layers see of inputs that vary a hundred times more along some axes."""
    generator = torch.Generator().manual_seed(2)
    views = {}
    for layer in adapter.layers:
        spread = torch.logspace(0, -2, layer.inputs, dtype=torch.float64)
        x = torch.randn(tokens, layer.inputs, generator=generator).double() * spread
        inner = x @ layer.A.double().T
        seen = Seen(gram=inner.T @ inner / tokens, output_power=power, tokens=tokens)
        views[layer.name] = (x, seen)
    return views


def test_data_decides_on_directions_and_not_on_ranks(few):
    budget = few.parameters // 2
    views = see(few, power=4.0)
    blind = compress(few, budget)
    made = compress(few, budget, {name: view for name, (_, view) in views.items()})
    for before, seen, unseen, cut in zip(
        few.layers, made.adapter.layers, blind.adapter.layers, made.layers, strict=True
    ):
        assert seen.r == unseen.r
        x, _ = views[before.name]
        given = x @ dense(before).T
        lost = (given - x @ dense(seen).T).norm()
        least = torch.linalg.svdvals(given)[seen.r :].square().sum().sqrt()
        torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-6)
        expected = float(lost) / (len(x) * 4.0) ** 0.5
        assert cut.output_lost == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_directions_that_no_text_uses_are_kept_if_the_budget_allows(few):
    budget = int(0.65 * few.parameters)
    one_token = {name: view for name, (_, view) in see(few, tokens=1).items()}
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    seen = Seen(gram=gram, output_power=1.0, tokens=1)
    one_axis = {layer.name: seen for layer in few.layers}
    blind = [layer.r for layer in compress(few, budget).adapter.layers]
    assert 2 in blind  # neither cut to one nor left whole
    for views in (one_token, one_axis):
        assert [layer.r for layer in compress(few, budget, views).adapter.layers] == blind


def test_layers_without_a_loss_stay_as_they_are_and_directions_without_energy_go(few):
    made = compress(few, few.parameters)
    assert made.energy_kept == 1
    for before, after in zip(few.layers, made.adapter.layers, strict=True):
        assert torch.equal(before.lora_A, after.lora_A)
        assert torch.equal(before.lora_B, after.lora_B)
    for layer in few.layers:
        layer.lora_B[:, 1:] = 0
    made = compress(few, few.parameters - 1)
    assert {layer.rank_after for layer in made.layers} == {1}
    assert made.energy_kept == pytest.approx(1)


@pytest.mark.parametrize("case", ["rslora", "embedding", "convolutions"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning")
def test_stock_peft_loads_the_cut_adapter_with_its_ranks(case, tmp_path):
    given = outputs(save_adapter(tmp_path / "given", case))
    adapter = read_adapter(tmp_path / "given")
    made = compress(adapter, int(0.6 * adapter.parameters))
    write_adapter(made.adapter, tmp_path / "made")
    loaded = load_adapter(tmp_path / "made", case)
    for layer, cut in zip(made.adapter.layers, made.layers, strict=True):
        module = loaded.base_model.model.get_submodule(layer.name)
        assert module.r["default"] == cut.rank_after
        assert module.scaling["default"] == pytest.approx(layer.scaling, rel=1e-6)
    for before, after in zip(adapter.layers, made.adapter.layers, strict=True):
        expected = best(dense(before), after.r)
        torch.testing.assert_close(dense(after), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(loaded), given, atol=1e-4)


def test_a_budget_below_one_rank_a_layer_is_refused_with_the_range(few):
    low = few.parameters // 3
    told = rf"4 layers, {low} parameters \(34%\), but got {low - 1}"
    with pytest.raises(BudgetError, match=told):
        compress(few, low - 1)
    assert compress(few, low).adapter.parameters == low


def test_a_layer_whose_output_is_zero_loses_nothing_of_it(few):
    for layer in few.layers:
        layer.lora_B.zero_()
    seen = Seen(gram=torch.zeros(3, 3).double(), output_power=0.0, tokens=5)
    made = compress(few, few.parameters // 2, {layer.name: seen for layer in few.layers})
    kept = {(cut.rank_after, cut.energy_kept, cut.output_lost) for cut in made.layers}
    assert kept == {(1, 1, 0)}
