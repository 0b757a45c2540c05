"""Texts in, statistics per layer out: sums over a plain forward's activations are the oracle."""

import pytest
import torch
from transformers import AutoTokenizer

from dynlora.adapter_files.activations import batch_texts, observe_texts
from dynlora.adapter_files.reader import read_adapter
from dynlora.errors import AdapterError, DataError
from tests.adapters import save_adapter, save_classifier_adapter
from tests.language import save_language_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]


def by_hand(model, layer, run):
    """Return inputs and outputs of a layer in a forward, as rows."""
    kept = {}
    module = model.base_model.model.get_submodule(layer.name)
    handle = module.register_forward_hook(
        lambda _, inputs, output: kept.update(x=inputs[0].detach(), y=output.detach())
    )
    run()
    handle.remove()
    return kept["x"], kept["y"]


def test_padding_is_not_seen(model, tmp_path):
    adapted = save_classifier_adapter(tmp_path, model, r=3)
    adapter = read_adapter(tmp_path)
    tokens = torch.randint(4, 15, (4, 8))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    mask[3, 2:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask}
    seen = observe_texts(adapted, adapter, [batch, batch])
    for layer in adapter.layers:
        x, y = by_hand(adapted, layer, lambda: adapted(**batch))
        whole = x.dim() == 3
        rows, out = (x[mask.bool()], y[mask.bool()]) if whole else (x, y)
        inner = rows.double() @ layer.A.double().T
        view = seen[layer.name]
        assert view.tokens == 2 * len(rows) == (2 * 23 if whole else 8)
        torch.testing.assert_close(view.gram, inner.T @ inner / len(rows), rtol=1e-5, atol=1e-7)
        power = float(out.double().square().sum(dim=1).mean())
        assert view.output_power == pytest.approx(power, rel=1e-5)


def test_embeddings_and_convolutions_are_seen_in_their_own_terms(tmp_path):
    adapted = save_adapter(tmp_path, "convolutions")
    adapter = read_adapter(tmp_path)
    tokens = torch.randint(0, 11, (4, 12))
    seen = observe_texts(adapted, adapter, [{"tokens": tokens}])
    layers = {layer.name: layer for layer in adapter.layers}
    columns = layers["embed"].A.double().T[tokens.flatten()]
    torch.testing.assert_close(seen["embed"].gram, columns.T @ columns / 48, rtol=1e-5, atol=1e-7)
    embed = adapted.base_model.model.embed.get_base_layer()
    embed.embed_scale = torch.tensor(3.0)  # as in Gemma
    scaled = observe_texts(adapted, adapter, [{"tokens": tokens}])["embed"].gram
    torch.testing.assert_close(scaled, 9 * seen["embed"].gram)
    del embed.embed_scale
    grid, _ = by_hand(adapted, layers["conv2"], lambda: adapted(tokens))
    patches = torch.nn.functional.unfold(grid, (3, 2), stride=2).transpose(1, 2).flatten(0, 1)
    inner = patches.double() @ layers["conv2"].A.double().T
    expected = inner.T @ inner / len(inner)
    torch.testing.assert_close(seen["conv2"].gram, expected, rtol=1e-5, atol=1e-7)


def test_hooks_are_removed_and_a_layer_without_input_is_named(tmp_path):
    adapted = save_adapter(tmp_path, "plain")
    with pytest.raises(AdapterError, match=r"got 0 tokens in layer 'model\.layers\.0"):
        observe_texts(adapted, read_adapter(tmp_path), [])
    assert not any(module._forward_hooks for module in adapted.modules())


def test_batches_are_padded_and_no_longer_than_the_model_can_read(model, tmp_path):
    texts = [["red " * length for length in range(1, 21)]]
    batches = batch_texts(texts, AutoTokenizer.from_pretrained(model), 10)
    assert [len(batch["input_ids"]) for batch in batches] == [16, 4]
    assert batches[1]["input_ids"].shape == (4, 10)
    expected = torch.tensor([min(length + 2, 10) for length in range(1, 17)])
    assert torch.equal(batches[0]["attention_mask"].sum(dim=1), expected)
    save_language_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    (batch,) = batch_texts([[""] * 16 + ["red"]], tokenizer, None)
    assert batch["input_ids"].shape[0] == 1, "texts without a token are left out"
    with pytest.raises(DataError, match="at least one token, but got 3 rows without any"):
        batch_texts([["", "", ""]], tokenizer, None)
