"""Other ranks for layers and adapters: dense SVDs and brute force over ranks are the oracles."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.adapter_files.layer import SavedLayer, Seen, find_components
from dynlora.adapter_files.reader import read_adapter, read_any
from dynlora.adapter_files.resize import plan_budget, plan_error, plan_rank, resize
from dynlora.errors import AdapterError, BudgetError
from tests.adapters import assert_close, load_adapter, outputs, save_adapter

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
    """Return a function from factors of each `lora_B` to an adapter of four layers of rank 3."""

    def read(*factors):
        save_adapter(tmp_path / "few", "plain", **FEW)
        path = tmp_path / "few/adapter_model.safetensors"
        tensors = load_file(path)
        halves = sorted(key for key in tensors if "lora_B" in key)
        for key, factor in zip(halves, factors, strict=True):
            tensors[key] *= factor
        save_file(tensors, path)
        return read_adapter(tmp_path / "few")

    return read


@pytest.fixture
def resized(tmp_path):
    """Return a function that writes an adapter with other ranks, and reads it."""
    folders = (tmp_path / f"made-{number}" for number in itertools.count())

    def write(adapter, ranks, seen=None):
        folder = next(folders)
        return resize(adapter, ranks, folder, seen), read_adapter(folder)

    return write


def lost(adapter, ranks):
    """Return the energy that dense truncated SVDs of these ranks lose."""
    return sum(
        float(torch.linalg.svdvals(dense(layer))[rank:].square().sum())
        for layer, rank in zip(adapter.layers, ranks, strict=True)
    )


@pytest.mark.parametrize("part", [0.35, 0.6])
def test_no_ranks_of_the_same_cost_keep_more_energy(few, resized, part):
    few = few(1, 2, 3, 4)
    budget = int(part * few.parameters)
    changes, made = resized(few, plan_budget(few, budget))
    ranks = [layer.rank_after for layer in changes.layers]
    spent = sum(rank * layer.cost for rank, layer in zip(ranks, few.layers, strict=True))
    assert spent == made.parameters == changes.parameters <= budget
    others = [
        other
        for other in itertools.product(range(1, 4), repeat=len(ranks))
        if sum(r * layer.cost for r, layer in zip(other, few.layers, strict=True)) <= spent
    ]
    least = min(lost(few, other) for other in others)
    assert lost(few, ranks) == pytest.approx(least, rel=1e-6)
    for before, after, cut in zip(few.layers, made.layers, changes.layers, strict=True):
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


def test_data_decides_on_directions(few, resized):
    few = few(1, 2, 3, 4)
    views = see(few, power=4.0)
    ranks = plan_rank(few, 2)
    changes, made = resized(few, ranks, {name: view for name, (_, view) in views.items()})
    for before, seen, cut in zip(few.layers, made.layers, changes.layers, strict=True):
        x, _ = views[before.name]
        given = x @ dense(before).T
        lost = (given - x @ dense(seen).T).norm()
        least = torch.linalg.svdvals(given)[2:].square().sum().sqrt()
        torch.testing.assert_close(lost, least, rtol=1e-4, atol=1e-6)
        expected = float(lost) / (len(x) * 4.0) ** 0.5
        assert cut.output_lost == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_no_ranks_of_the_same_cost_lose_less_of_the_outputs_on_data(few):
    few = few(1, 2, 3, 4)
    views = see(few)
    seen = {name: Seen(gram=view.gram, output_power=100.0**-place, tokens=view.tokens)
            for place, (name, (_, view)) in enumerate(views.items())}  # fmt: skip
    budget = few.parameters // 2
    ranks = plan_budget(few, budget, seen)
    squares = {layer.name: torch.linalg.svdvals(views[layer.name][0] @ dense(layer).T).square()
               for layer in few.layers}  # fmt: skip

    def lost(chosen):
        return sum(float(squares[name][rank:].sum()) / seen[name].output_power**0.5
                   for name, rank in zip(squares, chosen, strict=True))  # fmt: skip

    def cost(chosen):
        return sum(r * layer.cost for r, layer in zip(chosen, few.layers, strict=True))

    choices = itertools.product(range(1, 4), repeat=len(ranks))
    most = cost(ranks.values())
    assert most <= budget
    least = min(lost(chosen) for chosen in choices if cost(chosen) <= most)
    assert lost(ranks.values()) == pytest.approx(least, rel=1e-6)


def test_directions_that_no_text_uses_are_kept_if_the_rank_allows(few, resized):
    few = few(1, 1, 1, 1)
    gram = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    seen = Seen(gram=gram, output_power=1.0, tokens=1)
    _, made = resized(few, plan_rank(few, 2), {layer.name: seen for layer in few.layers})
    for before, after in zip(few.layers, made.layers, strict=True):
        # The texts use one direction of the output; of the rest, the strongest is kept.
        used = before.B[:, :1].double() / before.B[:, 0].double().norm()
        kept = used @ used.T @ dense(before)
        expected = kept + best(dense(before) - kept, 1)
        torch.testing.assert_close(dense(after), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [0.0, 0.3, 0.7])
def test_ranks_are_the_lowest_within_a_relative_error(few, error):
    few = few(1, 1, 1, torch.tensor([1.0, 0.0, 0.0]))
    views = see(few)
    power = {name: (x @ dense(layer).T).square().sum(dim=1).mean()
             for (name, (x, _)), layer in zip(views.items(), few.layers, strict=True)}  # fmt: skip
    seen = {name: Seen(gram=view.gram, output_power=float(power[name]), tokens=view.tokens)
            for name, (_, view) in views.items()}  # fmt: skip
    for ranks, output in (
        (plan_error(few, error), dense),
        (plan_error(few, error, seen), lambda layer: views[layer.name][0] @ dense(layer).T),
    ):
        for layer in few.layers:
            squares = torch.linalg.svdvals(output(layer)).square()
            errors = [float((squares[k:].sum() / squares.sum()).sqrt()) for k in range(1, 4)]
            assert ranks[layer.name] == 1 + sum(each > error + 1e-6 for each in errors)


def test_layers_that_keep_their_rank_stay_as_they_are(few, resized):
    few = few(1, 1, 1, 1)
    changes, made = resized(few, plan_budget(few, few.parameters))
    assert changes.energy_kept == 1
    for before, after in zip(few.layers, made.layers, strict=True):
        assert torch.equal(before.lora_A, after.lora_A)
        assert torch.equal(before.lora_B, after.lora_B)
        assert before.lora_alpha == after.lora_alpha


def test_directions_without_energy_go(few, resized):
    one = torch.tensor([1.0, 0.0, 0.0])
    few = few(one, one, one, one)
    changes, _ = resized(few, plan_budget(few, few.parameters))
    assert {layer.rank_after for layer in changes.layers} == {1}
    assert changes.energy_kept == pytest.approx(1)


GROWN = pytest.mark.parametrize("case", ["patterns", "rslora", "embedding", "convolutions", "bias"])
IGNORED = (
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:.*lora_B.bias",  # PEFT takes the bias of lora_B for a sharded weight
)


@GROWN
@pytest.mark.filterwarnings(*IGNORED)
@pytest.mark.parametrize(
    "plan", [lambda a: plan_rank(a, 5), lambda a: plan_budget(a, 2 * a.parameters)]
)
def test_an_adapter_that_grows_keeps_its_function_and_can_be_trained(case, plan, tmp_path, resized):
    given = outputs(save_adapter(tmp_path / "given", case, rank_pattern={}, r=3))
    adapter = read_adapter(tmp_path / "given")
    changes, made = resized(adapter, plan(adapter))
    assert all(layer.rank_after > layer.rank_before for layer in changes.layers)
    loaded = load_adapter(made.folder, case)
    assert_close(outputs(loaded), given)
    for before, after in zip(adapter.layers, made.layers, strict=True):
        module = loaded.base_model.model.get_submodule(after.name)
        assert module.scaling["default"] == pytest.approx(before.scaling, rel=1e-6)
        new = after.A[before.r :]
        assert 0.5 < float(new.abs().max()) * after.inputs**0.5 <= 1  # as PEFT's first rows
        assert not after.B[:, before.r :].any()


@pytest.mark.parametrize("case", ["rslora", "embedding", "convolutions"])
@pytest.mark.filterwarnings(*IGNORED)
def test_stock_peft_loads_the_cut_adapter_with_its_ranks(case, tmp_path, resized):
    given = outputs(save_adapter(tmp_path / "given", case))
    adapter = read_adapter(tmp_path / "given")
    changes, made = resized(adapter, plan_budget(adapter, int(0.6 * adapter.parameters)))
    loaded = load_adapter(made.folder, case)
    for layer, cut in zip(made.layers, changes.layers, strict=True):
        module = loaded.base_model.model.get_submodule(layer.name)
        assert module.r["default"] == cut.rank_after
        assert module.scaling["default"] == pytest.approx(layer.scaling, rel=1e-6)
    for before, after in zip(adapter.layers, made.layers, strict=True):
        expected = best(dense(before), after.r)
        torch.testing.assert_close(dense(after), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs(loaded), given, atol=1e-4)


def test_a_cut_kohya_file_has_the_alphas_of_the_same_scaling(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number in range(3):
        up = torch.randn(12, 12, generator=generator) if number else torch.zeros(12, 12)
        halves = {"lora_down": torch.randn(12, 20, generator=generator), "lora_up": up}
        name = f"lora_unet_{number}"
        tensors |= {f"{name}.{half}.weight": value.half() for half, value in halves.items()}
        tensors[f"{name}.alpha"] = torch.tensor(16.0).half()
    save_file(tensors, tmp_path / "given.safetensors")
    adapter = read_any(tmp_path / "given.safetensors")
    resize(adapter, plan_rank(adapter, 6), tmp_path / "made.safetensors")
    made = read_any(tmp_path / "made.safetensors")
    for before, after in zip(adapter.layers, made.layers, strict=True):
        assert (after.r, after.lora_alpha) == (6, 8)
        torch.testing.assert_close(dense(after), best(dense(before), 6), rtol=1e-2, atol=1e-2)


def test_a_budget_below_one_rank_a_layer_is_refused_with_the_lowest(few, resized):
    few = few(1, 1, 1, 1)
    low = few.parameters // 3
    told = rf"4 layers, {low} parameters \(34%\), but got {low - 1}"
    with pytest.raises(BudgetError, match=told):
        plan_budget(few, low - 1)
    changes, _ = resized(few, plan_budget(few, low))
    assert changes.parameters == low


def test_a_rank_above_all_widths_is_refused(few):
    with pytest.raises(AdapterError, match=r"at most 32, .* but got 33"):
        plan_rank(few(1, 1, 1, 1), 33)


def test_a_layer_whose_output_is_zero_loses_nothing_of_it(few, resized):
    few = few(0, 0, 0, 0)
    seen = Seen(gram=torch.zeros(3, 3).double(), output_power=0.0, tokens=5)
    changes, _ = resized(few, plan_rank(few, 1), {layer.name: seen for layer in few.layers})
    kept = {(cut.rank_after, cut.energy_kept, cut.output_lost) for cut in changes.layers}
    assert kept == {(1, 1, 0)}
