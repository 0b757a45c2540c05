"""The comparison of servers with PEFT: GGUF files for llama.cpp, and verdicts on continuations."""

import json

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engines.compare import NEAR_TIE, compare, first_difference
from benchmarks.engines.forward_only import continue_by_forward
from benchmarks.engines.gguf_files import dequantize_gguf, permute_rows, write_lora_gguf
from tests.gguf_files import BLOCK, finish

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN, RANK = 4, 2, 6, 24, 3
LAYERS = {theirs: ours for theirs, ours in BLOCK.items() if not theirs.endswith("norm")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Llama without weights on disk, and a LoRA adapter of all its layers."""
    folder = tmp_path_factory.mktemp("engines")
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    config.save_pretrained(folder / "base")
    lora = LoraConfig(
        r=RANK, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, bias="none"
    )
    get_peft_model(LlamaForCausalLM(config), lora).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def tensors(file):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def test_every_lora_matrix_comes_back_under_llama_cpps_name_with_its_values(folders, tmp_path):
    base, adapter = folders
    write_lora_gguf(adapter, base, tmp_path / "adapter.gguf")
    saved = load_file(adapter / "adapter_model.safetensors")
    expected = {}
    for index in range(2):
        for theirs, ours in LAYERS.items():
            key = f"base_model.model.model.layers.{index}.{ours}.lora_"
            name = f"blk.{index}.{theirs}.weight.lora_"
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            b = saved[f"{key}B.weight"]
            expected[f"{name}a"] = saved[f"{key}A.weight"]
            expected[f"{name}b"] = b if heads is None else permute_rows(b, heads=heads)
    found = tensors(tmp_path / "adapter.gguf")
    assert found.keys() == expected.keys()
    assert len(found) == len(saved) == 28
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    fields = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert {name: field.contents() for name, field in fields.items() if name[:4] != "GGUF"} == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
    }


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.other.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
    ],
    ids=["no layer of a Llama", "no matrix of a plain LoRA", "a layer that the base lacks"],
)
def test_a_tensor_with_no_place_in_the_model_is_refused(folders, tmp_path, key):
    base, adapter = folders
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    save_file({key: np.zeros((2, 2), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        write_lora_gguf(tmp_path, base, tmp_path / "adapter.gguf")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"must be a Llama.*got 'gpt2'"):
        write_lora_gguf(adapter, tmp_path, tmp_path / "adapter.gguf")


def test_permuted_rows_rotate_side_by_side_as_they_did_in_halves():
    """The order is right if llama.cpp's rotation of it gives the same scores of q and k."""
    torch.manual_seed(0)
    q, k = torch.randn(2, HEADS * HEAD_SIZE).double()
    angle = torch.arange(1, HEAD_SIZE // 2 + 1).double()

    def halves(x):
        a, b = x.view(HEADS, 2, -1).unbind(1)
        return a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()

    def pairs(x):
        x = torch.from_numpy(permute_rows(x[:, None].numpy(), heads=HEADS))[:, 0]
        a, b = x.view(HEADS, -1, 2).unbind(2)
        return a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()

    unrotated_k = k.view(HEADS, -1)
    scores = (torch.cat(halves(q), 1) * unrotated_k).sum(1)
    k_pairs = torch.from_numpy(permute_rows(k[:, None].numpy(), heads=HEADS)).view(HEADS, -1)
    rotated = torch.stack(pairs(q), 2).flatten(1)
    torch.testing.assert_close((rotated * k_pairs).sum(1), scores)


def test_a_dequantised_copy_has_the_same_numbers_and_metadata(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_token_list(["a", "<b>", "ü"])
    writer.add_token_types([1, 3, 1])
    writer.add_layer_norm_rms_eps(1e-5)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", values[0])
    finish(writer)

    dequantize_gguf(tmp_path / "source.gguf", tmp_path / "copy.gguf")

    source, copy = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("source", "copy"))
    kept = {k: (f.types, f.contents()) for k, f in source.fields.items() if k[:4] != "GGUF"}
    assert kept.pop("general.file_type")[1] == gguf.LlamaFileType.MOSTLY_Q8_0
    made = {k: (f.types, f.contents()) for k, f in copy.fields.items() if k[:4] != "GGUF"}
    assert made.pop("general.file_type")[1] == gguf.LlamaFileType.ALL_F32
    assert made == kept
    assert {t.tensor_type for t in copy.tensors} == {gguf.GGMLQuantizationType.F32}
    written = {tensor.name: tensor.data for tensor in copy.tensors}
    assert written.keys() == {"token_embd.weight", "output_norm.weight"}
    np.testing.assert_array_equal(written["output_norm.weight"], values[0])
    np.testing.assert_allclose(
        written["token_embd.weight"], values, atol=np.abs(values).max() / 250
    )


def peft(gap=1.0):
    return {
        "tokens": [5, 6, 2],
        "logprobs": [-0.1, -0.2, -0.3],
        "runner_up": [7, 8, 9],
        "gaps": [1.0, gap, 1.0],
    }


def engine(tokens=(5, 6, 2), logprobs=(-0.1, -0.2, -0.3)):
    return {"tokens": list(tokens), "logprobs": list(logprobs)}


def test_equal_tokens_pass_and_report_the_largest_difference_of_log_probabilities():
    verdict = compare([peft(), peft()], [engine(), engine(logprobs=(-0.1, -0.25, -0.3))])
    assert (verdict["passed"], verdict["equal"], verdict["prompts"]) == (True, 2, 2)
    assert verdict["logprob_difference"] == pytest.approx(0.05)
    # After a difference they do not count.
    verdict = compare([peft(gap=0.0)], [engine((5, 8, 3), (-0.1, -9.0, -9.0))])
    assert verdict["logprob_difference"] == 0
    with pytest.raises(ValueError, match="got 2 and 1"):
        compare([peft(), peft()], [engine()])


@pytest.mark.parametrize(("differing", "passed"), [(1, True), (2, False)])
def test_nineteen_of_twenty_are_enough_and_eighteen_are_not(differing, passed):
    near_ties = [(peft(gap=NEAR_TIE / 2), engine((5, 8, 2)))] * differing
    verdict = compare(*zip(*[(peft(), engine())] * (20 - differing), *near_ties, strict=True))
    assert (verdict["equal"], verdict["passed"]) == (20 - differing, passed)


@pytest.mark.parametrize(
    ("gap", "token"), [(NEAR_TIE * 2, 8), (NEAR_TIE / 2, 9)], ids=["no tie", "not the runner-up"]
)
def test_a_difference_that_rounding_does_not_explain_fails(gap, token):
    pairs = [(peft(), engine())] * 19 + [(peft(gap=gap), engine((5, token, 2)))]
    verdict = compare(*zip(*pairs, strict=True))
    assert (verdict["equal"], verdict["passed"]) == (19, False)
    assert verdict["differences"] == [
        {"prompt": 19, "place": 1, "peft": 6, "engine": token, "gap": gap, "near_tie": False}
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1)]
)
def test_the_first_difference_is_where_tokens_part(ours, theirs, place):
    assert first_difference(ours, theirs) == place


def test_one_forward_gives_the_greedy_continuation_up_to_the_first_other_token():
    def logits(ids):  # the next token is one more than the last
        return np.eye(10)[np.add(ids, 1) % 10]

    chosen = 1 - np.log(np.e + 9)
    for expected, tokens in (([4, 5, 6], [4, 5, 6]), ([4, 7, 8], [4, 5])):
        made = continue_by_forward(logits, [1, 3], expected)
        assert made == {"tokens": tokens, "logprobs": pytest.approx([chosen] * len(tokens))}
