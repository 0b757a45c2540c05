"""Activation taps: which forwards and tokens are shown, and keys that ignore batch and padding."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding, T5Config, T5ForConditionalGeneration

from dynlora.adapters.hooks import ActivationTaps
from dynlora.types import UNUSED_KEY
from tests.layer_kinds import CASES
from tests.lora_layers import layers_of, lora_chain
from tests.models import lora_llama

LAYER = "model.layers.0.self_attn.q_proj"


class Recorder:
    """Keeps all that the taps show, or the tokens of one index."""

    def __init__(self, index=None):
        self.shown, self.index = [], index

    def observe(self, name, keys, read):
        index = torch.arange(len(keys)) if self.index is None else self.index
        inputs, outputs = read(index)
        self.shown.append((name, inputs.detach(), outputs.detach(), keys))

    def tokens(self, name):
        """Return key and input of every token of one layer that is no padding, by key."""
        return {
            int(key): row
            for shown, inputs, _, keys in self.shown
            for key, row in zip(keys, inputs, strict=True)
            if shown == name and key != UNUSED_KEY
        }


def tapped(model, part=None, index=None):
    """Return a recorder of a part's layers, and the open taps that show it the model's inputs."""
    recorder = Recorder(index)
    taps = ActivationTaps(model, layers_of(part or model), recorder, timed=nullcontext)
    taps.open()
    return recorder, taps


@pytest.fixture
def llama():
    return lora_llama().train()


def with_lora(base, *targets, **lora):
    return get_peft_model(base, LoraConfig(r=2, target_modules=list(targets), **lora)).train()


TOKENS = torch.randint(1, 16, (4, 6), generator=torch.Generator().manual_seed(0))


def padded_to(count):
    mask = torch.zeros_like(TOKENS)
    mask[:, :count] = 1
    return mask


def test_every_layer_is_shown_once_with_what_enters_and_leaves_it():
    model = lora_chain(6, 5, 4).train()
    recorder, _ = tapped(model)
    inputs = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        middle = model.base_model.model[0](inputs)
        output = model.base_model.model[1](middle)
    assert recorder.shown == []
    model(inputs)
    assert [name for name, *_ in recorder.shown] == ["0", "1"]
    expected = [(inputs, middle), (middle, output)]
    for (_, *shown, keys), parts in zip(recorder.shown, expected, strict=True):
        torch.testing.assert_close(shown, [part.flatten(0, 1) for part in parts])
        assert keys.shape == (6,)


@pytest.mark.parametrize("told", ["labels", "decoder_attention_mask"])
def test_a_decoders_padding_is_that_of_what_it_says_and_not_of_what_it_reads(told):
    shape = {"num_layers": 1, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2}
    config = T5Config(vocab_size=20, **shape, dropout_rate=0, decoder_start_token_id=0)
    model = with_lora(T5ForConditionalGeneration(config), "q")
    said = torch.tensor([[5, 6, 7, 8], [9, 3, -100, -100]])
    spoken = (said != -100).long()
    words = {"labels": said, "decoder_attention_mask": spoken}
    if told == "labels":
        del words["decoder_attention_mask"]
    else:
        words["decoder_input_ids"] = words.pop("labels").clamp(min=0)
    recorder, _ = tapped(model)
    model(input_ids=TOKENS[:2], attention_mask=torch.ones(2, 6), **words)
    together = recorder.tokens("decoder.block.0.layer.0.SelfAttention.q")
    assert len(together) == 6
    assert len(recorder.tokens("encoder.block.0.layer.0.SelfAttention.q")) == 12
    recorder, _ = tapped(model)
    for row, length in enumerate((4, 2)):
        alone = {name: value[row : row + 1, :length] for name, value in words.items()}
        model(input_ids=TOKENS[row : row + 1], attention_mask=torch.ones(1, 6), **alone)
    apart = recorder.tokens("decoder.block.0.layer.0.SelfAttention.q")
    torch.testing.assert_close(apart, together)


def test_what_stands_under_the_padding_does_not_matter(llama):
    recorder, _ = tapped(llama)
    mask = padded_to(4)
    for filler in (0, 7):
        llama(input_ids=torch.where(mask > 0, TOKENS, filler), attention_mask=mask)
    assert torch.equal(recorder.shown[0][3], recorder.shown[-1][3])


def test_keys_are_all_different_below_that_of_padding_and_spread_evenly(llama):
    recorder, _ = tapped(llama)
    llama(input_ids=torch.randint(1, 16, (64, 32)))
    keys = recorder.shown[0][3]
    assert keys.unique().numel() == 64 * 32
    assert int(keys.min()) >= 0
    assert int(keys.max()) < UNUSED_KEY
    counts = torch.histc(keys.double() / UNUSED_KEY, bins=8, min=0, max=1)
    assert ((counts - 256).abs() < 5 * 256**0.5).all()


def test_an_example_seen_again_in_a_later_step_is_shown_once_with_new_keys(llama):
    recorder, taps = tapped(llama)
    llama(input_ids=TOKENS)
    first = set(recorder.tokens(LAYER))
    recorder.shown.clear()
    taps.close()
    taps.open(1)
    taps.open(1)
    llama(input_ids=TOKENS)
    assert not first & set(recorder.tokens(LAYER))
    assert [name for name, *_ in recorder.shown].count(LAYER) == 1


class Built(nn.Module):
    """Some layers, and a forward that is a function of the model and its inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@pytest.mark.parametrize("checkpointing", [{}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_layer_that_is_run_twice_is_shown_each_time_with_keys_of_its_own(checkpointing):
    def run(model, x):
        return checkpoint(model.layer, x, **checkpointing) if checkpointing else model.layer(x)

    twice = Built(lambda model, x: run(model, run(model, x)), layer=nn.Linear(6, 6))
    model = with_lora(twice, "layer")
    recorder, _ = tapped(model)
    inputs = torch.randn(4, 3, 6, requires_grad=True)
    middle = model.base_model.model.layer(inputs).detach()
    model(inputs).sum().backward()
    assert [name for name, *_ in recorder.shown] == ["layer", "layer"]
    entered = torch.cat([shown[1] for shown in recorder.shown])
    expected = torch.cat([inputs, middle]).flatten(0, 1)
    if checkpointing.get("use_reentrant"):  # shown as the backward pass comes by
        expected = torch.cat([middle, inputs]).flatten(0, 1)
    torch.testing.assert_close(entered, expected)
    keys = torch.cat([shown[3] for shown in recorder.shown])
    assert keys.unique().numel() == 24
    recorder.shown.clear()
    model(inputs[2:]).sum().backward()
    assert {int(key) for shown in recorder.shown for key in shown[3]} < {int(key) for key in keys}


def test_the_last_forward_is_shown_whatever_comes_before_its_backward_pass():
    """DPO evaluates a reference without gradients, or has two forwards for one loss."""
    run = Built(
        lambda model, inputs_embeds, attention_mask: checkpoint(
            model.layer, inputs_embeds, use_reentrant=True
        ),
        layer=nn.Linear(6, 6),
    )
    model = with_lora(run, "layer")
    recorder, _ = tapped(model)
    earlier, last = (torch.randn(2, 3, 6, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = model(inputs_embeds=earlier, attention_mask=torch.ones(2, 3)).sum()
    loss += model(inputs_embeds=last, attention_mask=mask).sum()
    with torch.no_grad():
        model(inputs_embeds=earlier, attention_mask=mask)
    loss.backward()
    seen = torch.stack([*recorder.tokens("layer").values()])
    expected = last.detach()[mask > 0]
    torch.testing.assert_close(seen.sort(dim=0).values, expected.sort(dim=0).values)


def test_embeddings_given_instead_of_tokens_are_keyed_by_their_content_without_padding(llama):
    recorder, _ = tapped(llama)
    embedded = llama.get_input_embeddings()(TOKENS).detach()
    llama(inputs_embeds=embedded, attention_mask=padded_to(2))
    together = recorder.tokens(LAYER)
    assert len(together) == 2 * len(TOKENS)
    recorder.shown.clear()
    llama(inputs_embeds=embedded[2:], attention_mask=padded_to(2)[2:])
    assert recorder.tokens(LAYER).keys() < together.keys()


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_mask_given_by_position_counts_like_one_given_by_name(task_type):
    model = lora_llama(task_type=task_type).train()
    recorder, _ = tapped(model)
    model(TOKENS, padded_to(2))
    assert len(recorder.tokens(LAYER)) == 2 * len(TOKENS)


def test_a_batch_given_as_one_mapping_is_shown_as_by_its_names(llama):
    batch = {"input_ids": TOKENS, "attention_mask": padded_to(2)}
    recorder, taps = tapped(llama)
    llama(**batch)
    taps.close()
    # As Sentence Transformers' models take it.
    whole = Built(lambda model, features: model.inner(**features), inner=llama).train()
    other, _ = tapped(whole, llama)
    whole(BatchEncoding(batch))
    assert other.tokens(LAYER).keys() == recorder.tokens(LAYER).keys()
    assert len(other.tokens(LAYER)) == 2 * len(TOKENS)


@pytest.mark.parametrize("name", ["input_features", "input_values", "pixel_values"])
def test_tokens_of_other_inputs_are_told_apart_whatever_comes_first(name):
    reader = Built(lambda model, **inputs: model.head(inputs[name]), head=nn.Linear(6, 5))
    model = with_lora(reader, "head")
    recorder, _ = tapped(model)
    mask = torch.ones(4, 7, dtype=torch.int64)
    model(attention_mask=mask, **{name: torch.randn(4, 7, 6)})
    assert len(recorder.tokens("head")) == mask.numel()


def test_inputs_without_a_sequence_are_shown_with_one_key_per_example():
    model = lora_chain(6, 5).train()
    recorder, _ = tapped(model)
    inputs = torch.randn(7, 6, dtype=torch.float64)
    model(inputs)
    keys = recorder.shown[0][3]
    assert keys.shape == (7,)
    assert keys.unique().numel() == 7
    model(inputs[3:])
    assert torch.equal(recorder.shown[1][3], keys[3:])


@pytest.mark.parametrize(
    ("reads", "keys"),
    [(lambda x: x.mean(dim=1), [4]), (lambda x: x.flatten(0, 1)[:7], [])],
    ids=["pooled", "no rows of the batch"],
)
def test_a_layer_on_pooled_inputs_sees_every_example_and_one_on_other_rows_none(reads, keys):
    base = Built(
        lambda model, input_ids, attention_mask: model.head(reads(model.embed(input_ids))),
        embed=nn.Embedding(16, 6),
        head=nn.Linear(6, 5),
    )
    model = with_lora(base, "head")
    recorder, _ = tapped(model)
    model(input_ids=TOKENS, attention_mask=padded_to(3))
    assert [shown[3].unique().numel() for shown in recorder.shown] == keys
    assert all(int(shown[3].max()) < UNUSED_KEY for shown in recorder.shown)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_position_ids_that_all_examples_share_count_for_each_of_them():
    model = CASES["Conv1D"].model(target_modules=["wte", "wpe"]).train()
    recorder, _ = tapped(model)
    mask = padded_to(4)
    model(input_ids=TOKENS, attention_mask=mask)
    positions, words = (recorder.tokens(f"transformer.{name}") for name in ("wpe", "wte"))
    assert positions.keys() == words.keys()
    assert len(words) == 4 * len(TOKENS)
    assert sorted(map(int, positions.values())) == sorted(list(range(4)) * len(TOKENS))
    recorder.shown.clear()
    for row, its_mask in zip(TOKENS, mask, strict=True):
        model(input_ids=row[None], attention_mask=its_mask[None])
    assert recorder.tokens("transformer.wpe") == positions


def test_every_patch_of_an_image_is_shown_with_the_output_at_its_place():
    model = CASES["Conv2d"].model().train()
    recorder, _ = tapped(model)
    batch = next(CASES["Conv2d"].batches(batch=3))
    model(**batch)
    # 10 by 10 pixels; kernel (3, 2) with stride (2, 1) and no padding leaves 4 by 9.
    shapes = {name: inputs.shape for name, inputs, _, _ in recorder.shown}
    assert shapes == {"first": (300, 27), "second": (108, 96), "third": (108, 216), "head": (3, 16)}
    together = {name: recorder.tokens(name) for name in shapes}
    assert [len(tokens) for tokens in together.values()] == [300, 108, 108, 3]
    recorder.shown.clear()
    for image in batch["pixel_values"]:
        model(pixel_values=image[None])
    for name, tokens in together.items():
        torch.testing.assert_close(recorder.tokens(name), tokens, atol=1e-5, rtol=1e-4)


def test_an_input_that_was_changed_in_place_is_shown_as_each_layer_read_it():
    def doubling(model, x):
        first = model.first(x)
        x.mul_(2)
        return first + model.second(x)

    base = Built(doubling, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    model = with_lora(base, "first", "second")
    recorder, _ = tapped(model, index=torch.arange(6))
    x = torch.arange(24.0).reshape(2, 3, 4)
    model(x.clone())
    first, second = (inputs for _, inputs, _, _ in recorder.shown)
    assert torch.equal(first, x.flatten(0, 1))
    assert torch.equal(second, 2 * x.flatten(0, 1))


def test_inputs_made_without_versions_are_shown():
    model = with_lora(nn.Sequential(nn.Linear(4, 4)), "0", lora_dropout=0.5)
    recorder, _ = tapped(model)
    with torch.inference_mode():
        x = torch.arange(24.0).reshape(2, 3, 4)
    model(x)
    assert torch.equal(recorder.shown[0][1], x.flatten(0, 1))
