"""Combined adapters: weights merged in float64 and `add_weighted_adapter` are the oracles."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import model as peft_model
from peft.utils import merge_utils

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.combine import SPARSE, combine, combine_sparse
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.reader import read_adapter
from dynlora.adapter_files.writer import write_adapter
from dynlora.errors import AdapterError
from tests.adapters import CASES, load_adapter, randomised, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:.*lora_B.bias",  # PEFT takes the bias of lora_B for a sharded weight
)
NO_PATTERNS = {"rank_pattern": {}, "alpha_pattern": {}}
OTHERS = {
    "plain": [
        {"r": 2, "target_modules": ["q_proj", "lm_head"], "use_rslora": True},
        {"r": 1, "target_modules": r".*layers\.1\..*_proj", "lora_alpha": -3},
    ],
    "patterns": [{"r": 6, "target_modules": ["q_proj"], "layers_to_transform": [1], **NO_PATTERNS}],
    "rslora": [{"use_rslora": False, "r": 3, "alpha_pattern": {}}],
    "embedding": [{"r": 2, "target_modules": ["q_proj"], **NO_PATTERNS}, {"lora_alpha": 1}],
    "head kept": [{"r": 1, "target_modules": ["down_proj"], "lora_alpha": 2}],
    "transposed": [{"r": 2, "target_modules": ["c_fc"], "rank_pattern": {}}],
    "convolutions": [{"r": 2, "target_modules": ["embed", "conv2"], "rank_pattern": {"embed": 4}}],
    "bias": [{"r": 2, "target_modules": ["conv1", "head"], "use_rslora": True}],
}
"""By case, settings of the adapters to combine with it."""


def save_with_others(folder, case, *settings):
    """Save the adapter of a case, and others of its base model; return their folders."""
    folders = [folder / str(number) for number in range(len(settings) + 1)]
    for seed, (place, changed) in enumerate(zip(folders, [{}, *settings], strict=True), start=1):
        model = save_adapter(place, case, **changed)
        randomised(model, seed=seed).save_pretrained(place)
    return folders


def merged(case, folder):
    """Return the base model's weights with an adapter merged by PEFT in float64."""
    base = CASES[case][0]().double()
    return PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_combination_has_the_mean_of_the_merged_weights_of_all_adapters(case, tmp_path):
    folders = save_with_others(tmp_path, case, *OTHERS[case])
    weights = [1 / 3] * 3 if len(folders) == 3 else [1.3, -0.3]
    made = combine([read_adapter(folder) for folder in folders], weights)
    write_adapter(made, tmp_path / "made")
    found, given = merged(case, tmp_path / "made"), [merged(case, folder) for folder in folders]
    for key, weight in found.items():
        mean = sum(w * state[key] for w, state in zip(weights, given, strict=True))
        torch.testing.assert_close(weight, mean, rtol=1e-6, atol=1e-7)
    ranks = [sum(layer.r for layer in read_adapter(folder).layers) for folder in folders]
    assert sum(layer.r for layer in made.layers) == sum(ranks)


def deltas(model, adapter="default"):
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer.get_delta_weight(adapter).detach() for layer in layers]


@pytest.mark.parametrize(
    ("method", "case", "changed"),
    [
        ("ties", "plain", {}),
        ("ties", "embedding", {}),
        ("ties", "transposed", {}),
        ("ties", "convolutions", {"target_modules": ["conv2", "head"]}),
        # Both sides draw the same elements in one layer alone.
        ("dare", "convolutions", {"target_modules": ["head"], **NO_PATTERNS}),
        ("dare-ties", "convolutions", {"target_modules": ["head"], **NO_PATTERNS}),
    ],
)
def test_ties_and_dare_equal_those_of_peft(method, case, changed, tmp_path, monkeypatch):
    folders = save_with_others(tmp_path, case, changed, changed | {"lora_alpha": 3})[1:]
    model = load_adapter(folders[0], case)
    model.load_adapter(folders[1], "other")
    monkeypatch.setattr(peft_model, SPARSE[method], seeded(SPARSE[method]))
    pair, weights = ["default", "other"], [0.7, 0.4]
    settings = {"combination_type": f"{SPARSE[method]}_svd", "svd_rank": 3, "density": 0.3}
    model.add_weighted_adapter(pair, weights, "made", **settings)

    adapters = [read_adapter(folder) for folder in folders]
    whole, all_kept = combine_sparse(adapters, weights, method=method, density=0.3, rank=99)
    made, kept = combine_sparse(adapters, weights, method=method, density=0.3, rank=3)
    write_adapter(made, tmp_path / "made")
    found, given = deltas(load_adapter(tmp_path / "made", case)), deltas(model, "made")
    for update, expected in zip(found, given, strict=True):
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    for layer, cut in zip(whole.layers, made.layers, strict=True):
        energies = [float((x.B @ x.A).square().sum()) for x in (cut, layer)]
        assert kept[layer.name] == pytest.approx(energies[0] / energies[1], rel=1e-4)
        assert all_kept[layer.name] == pytest.approx(1)


def seeded(function):
    """Return a function of PEFT that draws the same random elements at each call."""

    def run(*arguments):
        torch.manual_seed(0)
        return getattr(merge_utils, function)(*arguments)

    return run


def wide(seed, scale):
    """Return an adapter of one layer that is too wide for an exact SVD."""
    generator = torch.Generator().manual_seed(seed)
    layer = SavedLayer(
        name="wide", key_A="A", key_B="B", lora_alpha=scale, use_rslora=False,
        lora_A=torch.randn(8, 300, generator=generator),
        lora_B=torch.randn(400, 8, generator=generator),
    )  # fmt: skip
    return SavedAdapter(folder=Path("made"), config={}, layers=(layer,), others={})


@pytest.mark.parametrize("scale", [8.0, 1e35, 0.0])
def test_a_wide_layer_is_cut_nearly_as_well_as_by_an_exact_svd(scale):
    adapters = [wide(seed, scale) for seed in (1, 2)]
    made, kept = combine_sparse(adapters, [1.0, 1.0], method="ties", density=0.2, rank=6)
    (layer,) = made.layers
    updates = [each.layers[0].B @ each.layers[0].A for each in adapters]
    update = merge_utils.ties(updates, torch.ones(2), 0.2).double()
    squares = torch.linalg.svdvals(update).square()
    lost = (update * (scale / 8) - layer.scaling * layer.B.double() @ layer.A.double()).norm()
    assert float(lost) <= 1.01 * scale / 8 * float(squares[6:].sum().sqrt())
    if scale:
        assert layer.r == 6
        assert kept["wide"] == pytest.approx(float(squares[:6].sum() / squares.sum()), rel=1e-2)
    else:  # keeps a row that can be trained
        assert (layer.r, kept["wide"]) == (1, 1)
        assert layer.lora_A.any()


def test_updates_that_overflow_are_refused():
    adapters = [wide(seed, 1e38) for seed in (1, 2)]
    with pytest.raises(AdapterError, match=r"finite, but got .*wide.* scale down"):
        combine_sparse(adapters, [1.0, 1.0], method="ties", density=0.2, rank=6)
    with pytest.raises(AdapterError, match=r"finite, but got .*'B'.* scale down"):
        combine(adapters, [10.0, 10.0])
