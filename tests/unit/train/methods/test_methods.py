"""The four methods, from the base model to what the Trainer gets."""

import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer
from transformers import BertConfig, BertForSequenceClassification

from dynlora.errors import ConfigError
from dynlora.train.config import (
    AdaLoraSettings,
    DataConfig,
    JobConfig,
    LoraSettings,
    ModelConfig,
)
from dynlora.train.methods.adapter import lora_parameters
from dynlora.train.methods.prepare import prepare, unmasked_parameters

COST = 4 * 32 + 2 * 48 + 32  # a block's four 16x16 and two 16x32 layers, and the pooler


def base():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def job(method="dynamic", **sections):
    return JobConfig(
        output="out",
        method=method,
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        **{"lora": LoraSettings(r=2, lora_alpha=4), **sections},
    )


def test_lora_and_dynamic_begin_with_the_same_adapter_and_budget():
    torch.manual_seed(1)
    plain = prepare(base(), job("lora"), 100)
    torch.manual_seed(1)
    other = prepare(base(), job(), 100)
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in other.model.modules()]
    assert not any(map(any, hooks)), "the check that ranks can move leaves none behind"
    assert other.budget == other.start_parameters == 2 * COST
    mine, theirs = plain.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_full_training_trains_and_counts_every_parameter():
    model = base()
    total = sum(parameter.numel() for parameter in model.parameters())
    prepared = prepare(model, job("full"), 100)
    assert prepared.model is model
    assert prepared.budget == prepared.start_parameters == total
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adaloras_settings_follow_from_the_targets_rank_and_the_steps():
    prepared = prepare(base(), job("adalora"), 100)
    config = prepared.model.peft_config["default"]
    assert (config.init_r, config.target_r) == (3, 2)
    assert (config.tinit, config.tfinal, config.total_step) == (10, 30, 100)
    assert config.lora_alpha / config.init_r == 4 / 2, "its scale is that of LoRA"
    cost = COST + 7  # and a value of lora_E in each of the 7 layers
    assert (prepared.start_parameters, prepared.budget) == (3 * cost, 2 * cost)
    settings = AdaLoraSettings(initial_fraction=0.7, final_fraction=0.3)  # rounded, 0.3 < 1 - 0.7
    assert prepare(base(), job("adalora", adalora=settings), 1)
    with pytest.raises(ConfigError, match="got none in 10 steps with 7 before and 3 after"):
        prepare(base(), job("adalora", adalora=settings), 10)


def test_masked_ranks_of_adalora_do_not_count():
    model = prepare(base(), job("adalora"), 100).model
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    for layer in layers:
        layer.lora_E["default"].data.fill_(0.5)
    assert unmasked_parameters(layers) == 3 * (COST + 7)
    layers[0].lora_E["default"].data[1] = 0
    assert unmasked_parameters(layers) == 3 * (COST + 7) - 33


def test_the_penalty_is_the_one_that_peft_adds_to_its_own_loss():
    prepared = prepare(base(), job("adalora", adalora=AdaLoraSettings(orth_reg_weight=0.7)), 100)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    prepared.model.eval()
    outputs = prepared.model(**inputs)
    task = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
    assert prepared.penalty is not None
    assert torch.isclose(outputs.loss, task + prepared.penalty(), rtol=1e-5)


def test_lora_on_an_embedding_is_counted_too():
    config = job("lora", lora=LoraSettings(r=2, target_modules=("word_embeddings",)))
    assert lora_parameters(prepare(base(), config, 100).model) == 2 * (20 + 16)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (
            {"target_modules": ("classifier",)},
            r"got \[classifier\] .* end in classifier, dense, key",
        ),
        ({"modules_to_save": ("word_embeding",)}, "'word_embeding', .* name is 'word_embeddings'"),
    ],
)
def test_names_that_fit_nothing_are_refused(lora, told):
    with pytest.raises(ConfigError, match=told):
        prepare(base(), job(lora=LoraSettings(r=2, **lora)), 100)


def test_a_module_to_save_may_be_named_by_any_end_as_in_peft():
    config = job(lora=LoraSettings(r=2, modules_to_save=("embeddings.word_embeddings", "pooler")))
    model = prepare(base(), config, 100).model
    saved = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("word_embeddings.modules_to_save" in name for name in saved)
    assert any("pooler.modules_to_save" in name for name in saved)


def test_a_model_without_linear_layers_is_told_its_module_types():
    class Bare(torch.nn.Module):
        base_model_prefix = "mixer"

        def __init__(self):
            super().__init__()
            self.mixer = torch.nn.Conv1d(4, 4, 1)
            self.score = torch.nn.Conv1d(4, 2, 1)

    config = job("lora", lora=LoraSettings(r=2, target_modules=("query",)))
    with pytest.raises(ConfigError, match=r"it has none .* Conv1d \(2\)"):
        prepare(Bare(), config, 100)
