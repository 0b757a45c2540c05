"""Rewriting: stock PEFT, which loads what was written, is the oracle."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.adapter_files.adapter import read_adapter, write_adapter
from dynlora.adapter_files.rewrite import native, svd_uniform, uniform
from dynlora.errors import AdapterError
from tests.adapters import CASES, load_adapter, outputs, save_adapter

every_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:.*lora_B.bias",  # PEFT takes the bias of lora_B for a sharded weight
)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def close(made, given):
    """Compare to 1e-6 of the largest output."""
    torch.testing.assert_close(made, given, rtol=0, atol=1e-6 * float(given.abs().max()))


@every_case
def test_a_uniform_adapter_says_what_the_adapter_said(case, tmp_path):
    given = outputs(save_adapter(tmp_path / "given", case))
    assert not torch.allclose(given, outputs(CASES[case][0]().eval()), atol=1e-3)
    write_adapter(uniform(read_adapter(tmp_path / "given")), tmp_path / "made")
    close(outputs(load_adapter(tmp_path / "made", case)), given)


@every_case
def test_a_uniform_adapter_has_one_rank_and_a_scaling_of_one(case, tmp_path):
    save_adapter(tmp_path / "given", case)
    tensors = load_file(tmp_path / "given" / "adapter_model.safetensors")
    highest = max(len(tensor) for key, tensor in tensors.items() if key.count("_A"))
    write_adapter(uniform(read_adapter(tmp_path / "given")), tmp_path / "made")
    config = config_of(tmp_path / "made")
    assert config["r"] == config["lora_alpha"] == highest
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    for layer in read_adapter(tmp_path / "made").layers:
        assert (layer.r, layer.scaling) == (highest, 1)


def test_a_uniform_adapter_takes_the_rank_that_is_asked_for(tmp_path):
    given = outputs(save_adapter(tmp_path / "given", "patterns"))
    write_adapter(uniform(read_adapter(tmp_path / "given"), 16), tmp_path / "made")
    assert config_of(tmp_path / "made")["r"] == 16
    close(outputs(load_adapter(tmp_path / "made", "patterns")), given)


def test_a_rank_below_the_highest_is_refused(tmp_path):
    save_adapter(tmp_path, "patterns")
    with pytest.raises(AdapterError, match=r"highest rank, which is 7 .*q_proj.*got 4"):
        uniform(read_adapter(tmp_path), 4)


@every_case
def test_a_native_adapter_is_the_same_bit_for_bit(case, tmp_path):
    given = outputs(save_adapter(tmp_path / "given", case))
    write_adapter(native(read_adapter(tmp_path / "given")), tmp_path / "made")
    assert torch.equal(outputs(load_adapter(tmp_path / "made", case)), given)


def test_native_patterns_list_the_layers_of_each_rank(tmp_path):
    save_adapter(tmp_path / "given", "patterns")
    write_adapter(native(read_adapter(tmp_path / "given")), tmp_path / "made")
    names = {
        7: [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)],
        2: [f"model.layers.1.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")],
        1: ["model.layers.0.self_attn.v_proj"],
    }
    patterns = config_of(tmp_path / "made")["rank_pattern"]
    escaped = {rank: "|".join(these).replace(".", "\\.") for rank, these in names.items()}
    assert {rank: key for key, rank in patterns.items()} == {
        rank: f"^({these})$" for rank, these in escaped.items()
    }


@pytest.mark.parametrize(("alpha", "dtype"), [(8, torch.bfloat16), (3, torch.float32)])
def test_half_precision_stays_where_the_folded_scaling_can_be_written_in_it(alpha, dtype, tmp_path):
    model = save_adapter(tmp_path / "given", "plain", lora_alpha=alpha).bfloat16()
    model.save_pretrained(tmp_path / "half")
    given = outputs(load_adapter(tmp_path / "half", "plain"))
    write_adapter(uniform(read_adapter(tmp_path / "half")), tmp_path / "made")
    assert {layer.lora_B.dtype for layer in read_adapter(tmp_path / "made").layers} == {dtype}
    close(outputs(load_adapter(tmp_path / "made", "plain")), given)


def test_everything_else_in_the_file_is_kept_as_it_is(tmp_path):
    save_adapter(tmp_path / "given", "head kept")
    write_adapter(uniform(read_adapter(tmp_path / "given")), tmp_path / "made")
    before, after = read_adapter(tmp_path / "given"), read_adapter(tmp_path / "made")
    assert set(before.others) == set(after.others) == {"base_model.model.lm_head.weight"}
    for key, tensor in before.others.items():
        assert torch.equal(after.others[key], tensor)
    assert config_of(tmp_path / "made")["modules_to_save"] == ["lm_head"]


@pytest.mark.parametrize("rewrite", [uniform, lambda adapter: svd_uniform(adapter, 1)[0]])
def test_weights_that_overflow_are_not_written(rewrite, tmp_path):
    save_adapter(tmp_path / "given", "plain", lora_alpha=1e38)
    weights = load_file(tmp_path / "given" / "adapter_model.safetensors")
    save_file(
        {k: 1e9 * t for k, t in weights.items()}, tmp_path / "given/adapter_model.safetensors"
    )
    made = rewrite(read_adapter(tmp_path / "given"))
    with pytest.raises(AdapterError, match=r"finite, got .*what was made of .*given: .*too large"):
        write_adapter(made, tmp_path / "made")
    assert not (tmp_path / "made").exists()
