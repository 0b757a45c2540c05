"""Written and rewritten adapters: stock PEFT, which loads them, is the oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.adapter_files.reader import read_adapter
from dynlora.adapter_files.resize import uniform
from dynlora.adapter_files.writer import new_folder, write_adapter
from dynlora.errors import AdapterError
from tests.adapters import CASES, assert_close, load_adapter, outputs, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:.*lora_B.bias",  # PEFT takes the bias of lora_B for a sharded weight
)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_rewriting_keeps_the_function(case, tmp_path):
    given = outputs(save_adapter(tmp_path / "given", case))
    assert not torch.allclose(given, outputs(CASES[case][0]().eval()), atol=1e-3)
    before = read_adapter(tmp_path / "given")
    write_adapter(before.with_layers(before.layers), tmp_path / "native")
    assert torch.equal(outputs(load_adapter(tmp_path / "native", case)), given)

    tensors = load_file(tmp_path / "given" / "adapter_model.safetensors")
    highest = max(len(tensor) for key, tensor in tensors.items() if key.count("_A"))
    write_adapter(uniform(before), tmp_path / "made")
    assert_close(outputs(load_adapter(tmp_path / "made", case)), given)
    config, after = config_of(tmp_path / "made"), read_adapter(tmp_path / "made")
    assert config["r"] == config["lora_alpha"] == highest
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {(layer.r, layer.scaling) for layer in after.layers} == {(highest, 1)}
    assert set(after.others) == set(before.others)
    assert all(torch.equal(after.others[key], tensor) for key, tensor in before.others.items())
    assert config["modules_to_save"] == config_of(tmp_path / "given")["modules_to_save"]


@pytest.mark.parametrize(("alpha", "dtype"), [(8, torch.bfloat16), (3, torch.float32)])
def test_half_precision_stays_only_if_the_folded_weights_are_exact_in_it(alpha, dtype, tmp_path):
    model = save_adapter(tmp_path / "given", "plain", lora_alpha=alpha).bfloat16()
    model.save_pretrained(tmp_path / "half")
    given = outputs(load_adapter(tmp_path / "half", "plain"))
    write_adapter(uniform(read_adapter(tmp_path / "half")), tmp_path / "made")
    assert {layer.lora_B.dtype for layer in read_adapter(tmp_path / "made").layers} == {dtype}
    assert_close(outputs(load_adapter(tmp_path / "made", "plain")), given)


def test_weights_that_overflow_are_not_written(tmp_path):
    save_adapter(tmp_path / "given", "plain", lora_alpha=1e38)
    path = tmp_path / "given/adapter_model.safetensors"
    save_file({key: 1e9 * tensor for key, tensor in load_file(path).items()}, path)
    made = uniform(read_adapter(tmp_path / "given"))
    with pytest.raises(AdapterError, match=r"finite, but got .*given: .*too large"):
        write_adapter(made, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_an_error_that_names_the_output_and_leaves_nothing(tmp_path):
    def fill() -> None:
        with new_folder(tmp_path / "made") as draft:
            (draft / "half").write_text("half")
            raise OSError(28, "the disk is full")

    with pytest.raises(OSError, match=r"the disk is full.*made"):
        fill()
    assert list(tmp_path.iterdir()) == []
