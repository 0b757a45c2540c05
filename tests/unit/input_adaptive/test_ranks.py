"""The hooks of input-adaptive ranks: what they read, which layers they reach, what they refuse."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DynamicCache,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from dynlora import InputAdaptiveRanks
from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import EngineError, LayerError
from tests.models import bare_bert, bare_llama, sequences
from tests.towers import dual_encoder


def lora_on(base, *targets, r=8):
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets))
    model = get_peft_model(base, config)
    torch.manual_seed(3)
    for layer in find_lora_layers(model, None):
        layer.lora_B.data.normal_(std=0.2)
    return model.eval()


def taught(model, **batch):
    """Install the hooks with thresholds from the examples of a batch."""
    adaptive = InputAdaptiveRanks(model)
    adaptive.observing = True
    model.train()
    model(**batch)
    adaptive.after_event(lambda: None)
    adaptive.observing = False
    model.eval()
    return adaptive


@pytest.fixture
def llama():
    model = lora_on(bare_llama(), "q_proj", "down_proj")
    taught(model, input_ids=next(sequences()))
    return model


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.linspace(0.1, 2, count)[:, None, None, None]
    return contrast * torch.randn(count, 3, 16, 16, generator=generator)


def bare_vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes, initializer_range=0.3))


def bare_resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)
    return ResNetForImageClassification(config)


@pytest.mark.parametrize(
    ("base", "targets"),
    [(bare_vit, ["q_proj", "classifier", "projection"]), (bare_resnet, ["convolution"])],
)
def test_an_image_uses_more_components_the_more_its_pixels_vary(base, targets):
    model = lora_on(base(), *targets)
    kinds = {type(layer.module.get_base_layer()) for layer in find_lora_layers(model, None)}
    assert nn.Conv2d in kinds
    adaptive = taught(model, pixel_values=pictures(32))
    images = pictures(8, seed=5)
    fractions = adaptive.fractions(pixel_values=images)
    assert fractions.tolist() == sorted(fractions.tolist())
    assert set(fractions.tolist()) == {0.25, 0.5, 0.75, 1.0}
    with torch.no_grad():
        together = model(pixel_values=images).logits
        for row, image in enumerate(images):
            alone = model(pixel_values=image[None]).logits[0]
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-4)
        with adaptive.disabled():
            assert (model(pixel_values=images).logits[0] - together[0]).abs().max() > 1e-3


def test_an_error_within_a_forward_leaves_the_next_one_as_it_was(llama):
    tokens = next(sequences(seed=2))
    with torch.no_grad():
        before = llama(input_ids=tokens).logits
        with pytest.raises(IndexError):
            llama(input_ids=tokens + 99)
        with pytest.raises(LayerError, match="packing"):
            llama(input_ids=tokens, position_ids=torch.arange(12)[None] % 5)
        assert torch.equal(llama(input_ids=tokens).logits, before)


def test_a_layer_that_is_run_outside_of_the_model_is_refused_by_its_name(llama):
    layer = llama.get_base_model().model.layers[1].mlp.down_proj
    with (
        torch.no_grad(),
        pytest.raises(EngineError, match=r"layers\.1\.mlp\.down_proj.*0 forwards"),
    ):
        layer(torch.randn(1, 2, 64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)}, "position_ids that restart"),
        ({"position_ids": torch.zeros(3, 2, 6, dtype=torch.int64)}, r"of shape \(3, 2, 6\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "got cu_seq_lens_q: switch packing"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"\(2, tokens\).* got \(2, 1, 6, 6\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"at least 6 tokens, got \(2, 4\)"),
        ({"attention_mask": {"full_attention": None}}, "got dict"),
        ({"past_key_values": ((1, 2),)}, "got a tuple: use `DynamicCache`"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 6, 32)},
            "need `input_ids`, got inputs_embeds",
        ),
    ],
)
def test_what_hides_an_examples_own_tokens_is_refused(llama, given, message):
    batch = {"input_ids": next(sequences(batch=2, length=6))} | given
    with torch.no_grad(), pytest.raises((LayerError, EngineError), match=message):
        llama.get_base_model()(**batch)


def test_beam_search_is_refused(llama):
    tokens = next(sequences(batch=2, length=6))
    settings = {"pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 4, "num_beams": 3}
    with pytest.raises(EngineError, match=r"reordered, repeated or cut .* `num_beams=1`"):
        llama.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)


@pytest.mark.parametrize(
    "change",
    [lambda cache: cache.crop(-2), lambda cache: cache.reorder_cache(torch.tensor([1, 0]))],
)
def test_a_cache_that_was_changed_between_two_calls_is_refused(llama, change):
    tokens, cache = next(sequences(batch=2, length=8)), DynamicCache()
    with torch.no_grad():
        llama(input_ids=tokens[:, :6], cache=cache)
        change(cache)
        with pytest.raises(EngineError, match="got a DynamicCache whose sequences were"):
            llama(input_ids=tokens[:, 6:7], cache=cache)


def small_mixtral():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes))


def small_t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        (small_mixtral, "q_proj", r"MixtralForCausalLM with num_local_experts=4 \(mixture of exp"),
        (small_t5, "q", "encoder and the decoder of a T5ForConditionalGeneration"),
        (dual_encoder, "q_proj", r"image and text \(VisionTextDualEncoderModel\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "0", "model of transformers, got a Sequential"),
        (bare_bert, "word_embeddings", "'embeddings.word_embeddings' on a Embedding: leave it out"),
    ],
)
def test_models_and_layers_that_it_does_not_fit_are_refused_by_name(base, target, message):
    model = get_peft_model(base(), LoraConfig(target_modules=[target]))
    with pytest.raises(LayerError, match=message):
        InputAdaptiveRanks(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_with_a_compiled_part_is_refused():
    model = get_peft_model(bare_llama(), LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].compile(backend="eager")
    with pytest.raises(EngineError, match=r"must run without torch\.compile, .* got a comp"):
        InputAdaptiveRanks(model)


def test_dora_is_refused():
    model = get_peft_model(bare_llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(LayerError, match=r"LoRA, not DoRA, .*q_proj' on a Linear"):
        InputAdaptiveRanks(model)


def test_an_embedding_that_is_trained_as_it_is_is_refused_and_a_copy_of_it_is_not():
    model = get_peft_model(bare_llama(), LoraConfig(target_modules=["q_proj"]))
    model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(LayerError, match="requires_grad=True: freeze it"):
        InputAdaptiveRanks(model)
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(bare_llama(), saved)
    adaptive = taught(model, input_ids=next(sequences()))
    thresholds = adaptive.thresholds
    model.get_input_embeddings().weight.data.mul_(3)
    taught_again = taught(model, input_ids=next(sequences()))
    assert taught_again.thresholds == thresholds


def test_pooled_tokens_of_a_causal_model_are_refused_with_the_layers_name():
    model = lora_on(bare_llama(), "q_proj", "lm_head")
    taught(model, input_ids=next(sequences()))
    tokens = next(sequences())
    with torch.no_grad():
        model(input_ids=tokens)
        with pytest.raises(LayerError, match=r"'lm_head' .*\(8, 12\), got rows of shape \(8, 2\)"):
            model(input_ids=tokens, logits_to_keep=2)


def test_another_adapter_is_left_alone():
    model = lora_on(bare_llama(), "q_proj")
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("other")
    for layer in find_lora_layers(model, "other"):
        layer.lora_B.data.normal_(std=0.2)
    tokens = next(sequences())
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        InputAdaptiveRanks(model, adapter_name="default", thresholds=(1e9, 2e9, 3e9))
        assert torch.equal(model(input_ids=tokens).logits, plain)
        model.set_adapter("default")
        masked = model(input_ids=tokens).logits[:, 1:]
        for layer in find_lora_layers(model, "default"):
            assert layer.lora_B[:, 2:].any()
            layer.lora_B[:, 2:] = 0  # no complexity reaches these thresholds: 2 of 8 are used
        assert torch.equal(model(input_ids=tokens).logits[:, 1:], masked)


def test_a_call_that_failed_half_way_leaves_a_cache_that_is_refused(llama):
    tokens, cache = next(sequences(batch=2, length=8)), DynamicCache()
    last = llama.get_base_model().model.layers[1]

    def fail(*_):
        raise MemoryError

    with torch.no_grad():
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            llama(input_ids=tokens[:, :6], cache=cache)
        handle.remove()
        with pytest.raises(EngineError, match="DynamicCache of 6 tokens that they have not"):
            llama(input_ids=tokens[:, 6:7], cache=cache)
