"""`dynlora export --format mlx`: the updates of stock PEFT are the oracle."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dynlora.cli.main import main
from tests.adapters import save_adapter
from tests.jobs import missing


def test_mlx_factors_multiply_inputs_to_pefts_update_at_one_rank(tmp_path):
    model = save_adapter(tmp_path / "given", "rslora")
    made = tmp_path / "made"
    assert main(["export", str(tmp_path / "given"), "--format", "mlx", "--output", str(made)]) == 0
    config = json.loads((made / "adapter_config.json").read_text())
    lora, factors = config["lora_parameters"], load_file(made / "adapters.safetensors")
    assert config["fine_tune_type"] == "lora"
    layers = {name.rpartition(".")[0] for name in factors}
    assert len(layers) * 2 == len(factors)
    for name in layers:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert a.shape[1] == len(b) == lora["rank"]
        update = model.base_model.model.get_submodule(name).get_delta_weight("default")
        x = np.random.default_rng(0).normal(size=(3, len(a)))
        np.testing.assert_allclose(
            x @ a @ b * lora["scale"], x @ update.detach().numpy().T, rtol=0, atol=1e-5
        )
    # MLX-LM replaces the modules of these names in every block, and no other.
    assert set(lora["keys"]) == {name.split(".", 3)[3] for name in layers}
    assert config["num_layers"] == -1


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("embedding", "an embedding, model.embed_tokens"),
        ("head kept", "lm_head.weight of `modules_to_save`"),
        ("bias", "a bias of lora_B"),
        ("convolutions", "a convolution, conv1"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes a bias for a sharded factor
def test_an_adapter_that_mlx_cannot_hold_is_refused_by_name(case, told, tmp_path, refused):
    save_adapter(tmp_path / "given", case)
    made = tmp_path / "made"
    error = refused("export", tmp_path / "given", "--format", "mlx", "--output", made)
    assert missing(error, f"{told} | linear layers | --format merged") == []
    assert not made.exists()
