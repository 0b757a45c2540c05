"""GGUF files made in code: a tiny Llama with its tokenizer, and files that cannot be read."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = ["<|endoftext|>", "<bos>", "<pad>", *"abcdefghijkl", "ab"]

BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""GGUF's names of a block's weights, and transformers'."""
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def llama() -> LlamaForCausalLM:
    """Return a random Llama of two blocks over `TOKENS`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, tie_word_embeddings=False, eos_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_gguf(file: Path, model: LlamaForCausalLM, tokens: list[str]) -> Path:
    """Write a Llama in float32 with a byte-level tokenizer of these tokens, of which three are
    special: the end of a text, its beginning and padding, in this order at the front. There must be
    an "a", a "b" and an "ab"; transformers adds "<|endoftext|>" where it is not among them."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(2)
    for name, values in _tensors(model).items():
        writer.add_tensor(name, values)
    finish(writer)
    return file


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    state = {name: value.float().numpy() for name, value in model.state_dict().items()}
    named = {f"{there}.weight": state[f"{ours}.weight"] for there, ours in WHOLE.items()}
    config = model.config
    for block in range(config.num_hidden_layers):
        for there, ours in BLOCK.items():
            values = state[f"model.layers.{block}.{ours}.weight"]
            if there == "attn_q":
                values = _interleave(values, config.num_attention_heads)
            if there == "attn_k":
                values = _interleave(values, config.num_key_value_heads)
            named[f"blk.{block}.{there}.weight"] = values
    return named


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return a projection's rows in llama.cpp's order: pairs that rotate together side by side."""
    rows, columns = values.shape
    return (
        values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


def save_bogus_gguf(file: Path, architecture: str = "bogus") -> Path:
    """Write a whole file of an architecture that does not exist."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    finish(writer)
    return file
