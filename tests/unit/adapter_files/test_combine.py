"""Combined adapters: weights merged by PEFT in float64 are the oracle."""

import pytest
import torch
from peft import PeftModel

from dynlora.adapter_files.adapter import read_adapter, write_adapter
from dynlora.adapter_files.combine import combine
from tests.adapters import CASES, randomised, save_adapter

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
