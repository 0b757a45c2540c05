"""Taps on attention: what they show is what the model looked at, and nothing else changes."""

import contextlib
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynlora.adapters.attention import AttentionTaps, attention_rows
from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import ConfigError
from dynlora.importance.attention_entropy import AttentionEntropyMetric
from tests.lora_layers import lora_chain
from tests.models import adamw, attached, bare_bert, bare_llama

TEXT = torch.tensor([[3, 5, 7, 2, 9, 4], [6, 2, 8, 1, 0, 0], [4, 9, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])


def adapted(base: nn.Module, implementation: str | None = None) -> nn.Module:
    if implementation is not None:
        base.set_attn_implementation(implementation)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, config).train()


def bert(implementation: str = "sdpa") -> nn.Module:
    return adapted(bare_bert(layers=2), implementation)


def llama(implementation: str = "sdpa") -> nn.Module:
    return adapted(bare_llama(), implementation)


class Watch:
    """A metric behind taps; open from the start."""

    def __init__(self, model: nn.Module) -> None:
        self.metric = AttentionEntropyMetric()
        self.layers = find_lora_layers(model, None)
        self.taps = AttentionTaps(model, self.layers, self.metric, timed=contextlib.nullcontext)
        self.taps.open()

    def scores(self) -> dict[str, float]:
        self.metric.observe(self.layers)
        return self.metric.scores(self.layers, {})


def focus_of(weights: torch.Tensor, mask: torch.Tensor, *, causal: bool) -> float:
    """Work out a block's score from the weights that eager attention returns."""
    found = []
    for example, length in enumerate(mask.sum(dim=1).tolist()):
        for head in weights[example]:
            for place in range(length):
                keys = place + 1 if causal else length
                row = [float(w) for w in head[place, :keys]]
                if keys >= 2:
                    entropy = -sum(w * math.log(w) for w in row if w > 0)
                    found.append(1 - entropy / math.log(keys))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("build", "causal", "implementation"),
    [(bert, False, "sdpa"), (llama, True, "sdpa"), (llama, True, "eager")],
)
def test_scores_are_those_of_the_weights_that_eager_attention_returns(
    build: Any, causal: bool, implementation: str
) -> None:
    oracle = build("eager")(input_ids=TEXT, attention_mask=MASK, output_attentions=True)
    model = build(implementation)
    watch = Watch(model)
    model(input_ids=TEXT, attention_mask=MASK)
    scores = watch.scores()
    assert len(scores) == len(watch.layers)
    for block, weights in enumerate(oracle.attentions):
        expected = focus_of(weights.detach(), MASK, causal=causal)
        own = [score for name, score in scores.items() if f".{block}." in f".{name}"]
        assert len(own) == len(scores) / 2, "a block's layers share their score"
        assert own == [pytest.approx(expected, abs=1e-6)] * len(own)
    assert len({round(score, 6) for score in scores.values()}) == 2


@pytest.mark.parametrize("build", [bert, llama])
def test_scores_are_the_same_for_examples_alone_in_a_batch_and_padded(build: Any) -> None:
    model = build()
    together, alone, padded = (Watch(model) for _ in range(3))
    watches = (together, alone, padded)

    def show(to: Watch, text: torch.Tensor, mask: torch.Tensor) -> None:
        for watch in watches:
            watch.taps.open() if watch is to else watch.taps.close()
        model(input_ids=text, attention_mask=mask)

    show(together, TEXT, MASK)
    for text, mask in zip(TEXT, MASK, strict=True):
        show(alone, text[mask > 0][None], mask[mask > 0][None])
    more = torch.full((3, 4), 7)
    show(padded, torch.cat([TEXT, more], 1), torch.cat([MASK, 0 * more], 1))
    scores = [watch.scores() for watch in watches]
    for other in scores[1:]:
        assert other == {name: pytest.approx(s, abs=1e-6) for name, s in scores[0].items()}


@pytest.mark.parametrize(("build", "implementation"), [(bert, "eager"), (llama, "sdpa")])
def test_outputs_and_gradients_are_bit_for_bit_what_they_are_without_taps(
    build: Any, implementation: str
) -> None:
    found = []
    for tapped in (False, True):
        model = build(implementation)
        watch = Watch(model) if tapped else None
        torch.manual_seed(5)
        outputs = model(input_ids=TEXT, attention_mask=MASK)
        outputs[0].square().mean().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((outputs[0].detach(), gradients, torch.get_rng_state()))
        assert watch is None or watch.scores()
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert torch.equal(found[0][2], found[1][2])


def test_only_training_forwards_of_sampled_steps_are_shown_and_nothing_is_left_behind() -> None:
    model, other = llama(), llama()
    before = dict(ALL_ATTENTION_FUNCTIONS)
    watch, beside = Watch(model), Watch(other)
    configs = {m: m.config for m in model.modules() if "config" in vars(m)}
    with torch.no_grad():
        model(input_ids=TEXT)
    model.eval()(input_ids=TEXT)
    model.train()
    watch.taps.close()
    watch.taps.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(input_ids=TEXT)
    with model.disable_adapter():
        watch.taps.open()
        model(input_ids=TEXT)
    other(input_ids=TEXT)
    assert watch.scores() == {}
    assert beside.scores(), "another model's taps are its own"
    model(input_ids=TEXT)
    assert watch.scores()
    assert all(m.config is config for m, config in configs.items())
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_attention_is_left_as_it_was_after_a_forward_that_fails() -> None:
    model = llama()
    watch = Watch(model)
    block = model.get_base_model().model.layers[1]
    before = block.self_attn.config

    def fail(*_: Any) -> None:
        assert block.self_attn.config is not before
        raise RuntimeError("out of memory")

    handle = block.self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(input_ids=TEXT)
    handle.remove()
    assert block.self_attn.config is before
    assert not any(name.startswith("dynlora") for name in ALL_ATTENTION_FUNCTIONS)
    assert len(watch.layers) == 14


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_other_kinds_of_models_are_reached_too() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8, n_inner=16)
    )
    image = ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4,
        )
    )  # fmt: skip
    for base, inputs in (
        (gpt2, {"input_ids": TEXT, "attention_mask": MASK}),
        (image, {"pixel_values": torch.randn(2, 3, 8, 8)}),
    ):
        model = adapted(base)
        watch = Watch(model)
        model(**inputs)
        scores = watch.scores()
        assert len(set(scores.values())) == 2
        assert all(0 < score < 1 for score in scores.values())


def t5() -> nn.Module:
    config = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return adapted(T5ForConditionalGeneration(config))


def flash() -> nn.Module:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: lora_chain(8, 8), "got a Sequential without such a block"),
        (t5, "got a T5ForConditionalGeneration with"),
        (flash, "eager or sdpa, got flash_attention_2 in a LlamaAtt"),
    ],
)
def test_a_model_whose_attention_cannot_be_reached_is_refused(build: Any, told: str) -> None:
    model = build()
    with pytest.raises(ConfigError, match=rf"`importance: attention_entropy` needs .* {told}"):
        attached(model, adamw(model), importance="attention_entropy")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_of_many_tokens_evenly_spaced_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynlora.adapters.attention.QUERIES", 3)
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, 6, 4), torch.randn(3, 1, 6, 4)
    mask = MASK[:, None, None, :].bool()
    table = query @ key.transpose(2, 3) / 2
    found = list(attention_rows(query, key, mask, causal=False, options={}))
    for place, chosen in enumerate(([0, 2, 4], [0, 2], [0, 1])):
        torch.testing.assert_close(found[place][0], table[place][:, chosen])
        assert torch.equal(found[place][1], mask[place].expand(1, 6, 6)[:, chosen])


def test_a_mask_may_be_a_bias_and_logits_may_be_capped() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    bias = torch.randn(1, 2, 6, 6)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mask = torch.randn(1, 1, 6, 6).masked_fill(hidden, torch.finfo(torch.float32).min)
    options = {"scaling": 0.3, "softcap": 2.0, "position_bias": bias}
    ((logits, visible),) = attention_rows(query, key, mask, causal=True, options=options)
    expected = 2 * torch.tanh(query @ key.transpose(2, 3) * 0.3 / 2) + bias
    assert torch.equal(visible[0], ~hidden)
    shown = (logits - expected[0])[:, ~hidden]
    torch.testing.assert_close(shown, mask[0].expand(2, 6, 6)[:, ~hidden], atol=1e-5, rtol=0)


def test_keys_of_other_tokens_than_the_queries_are_not_looked_at() -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 6, 4)
    assert list(attention_rows(query, key, None, causal=True, options={})) == []


def test_half_precision_around_the_model_rounds_nothing_that_is_worked_out() -> None:
    model = llama()
    watch = Watch(model)
    kinds = set()
    attend = watch.metric.attend

    def note(names: Any, logits: torch.Tensor, visible: torch.Tensor) -> None:
        kinds.add(logits.dtype)
        attend(names, logits, visible)

    watch.metric.attend = note  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=TEXT, attention_mask=MASK)
    assert kinds == {torch.float32}
    assert watch.scores()
