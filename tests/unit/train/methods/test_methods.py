"""The four methods, from the base model to what the Trainer gets."""

from typing import Any

import pytest
import torch
from peft.tuners.adalora import AdaLoraLayer
from transformers import BertConfig, BertForSequenceClassification

from dynlora.errors import BudgetError, ConfigError
from dynlora.train.config import (
    AdaLoraSettings,
    DataConfig,
    JobConfig,
    LoraSettings,
    ModelConfig,
)
from dynlora.train.methods.adalora import orthogonality_penalty, unmasked_parameters
from dynlora.train.methods.adapter import lora_parameters
from dynlora.train.methods.prepare import prepare

COST = 4 * 32 + 2 * 48 + 32  # a block's four 16x16 and two 16x32 layers, and the pooler


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def job(method: str = "dynamic", **sections: Any) -> JobConfig:
    return JobConfig(
        output="out",
        method=method,
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        **{"lora": LoraSettings(r=2, lora_alpha=4), **sections},
    )


@pytest.mark.parametrize("method", ["dynamic", "lora"])
def test_lora_and_dynamic_begin_with_the_same_adapter_and_budget(method: str) -> None:
    torch.manual_seed(1)
    plain = prepare(base(), job("lora"), 100)
    torch.manual_seed(1)
    other = prepare(base(), job(method), 100)
    assert other.budget == other.start_parameters == 2 * COST
    mine, theirs = plain.model.state_dict(), other.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_full_training_trains_and_counts_every_parameter() -> None:
    model = base()
    total = sum(parameter.numel() for parameter in model.parameters())
    prepared = prepare(model, job("full"), 100)
    assert prepared.model is model
    assert prepared.budget == prepared.live_parameters() == prepared.peak_parameters() == total
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checking_that_ranks_can_move_leaves_no_hook_behind() -> None:
    model = prepare(base(), job(), 100).model
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_adaloras_settings_follow_from_the_targets_rank_and_the_steps() -> None:
    prepared = prepare(base(), job("adalora"), 100)
    config = prepared.model.peft_config["default"]
    assert (config.init_r, config.target_r) == (3, 2)
    assert (config.tinit, config.tfinal, config.total_step) == (10, 30, 100)
    assert config.lora_alpha / config.init_r == 4 / 2, "its scale is that of LoRA"
    cost = COST + 7  # and a value of lora_E in each of the 7 layers
    assert (prepared.start_parameters, prepared.budget) == (3 * cost, 2 * cost)
    assert prepared.peak_parameters() == 3 * cost


def test_adalora_needs_a_step_in_which_ranks_fall() -> None:
    settings = AdaLoraSettings(initial_fraction=0.5, final_fraction=0.49)
    assert prepare(base(), job("adalora", adalora=settings), 100)
    settings = AdaLoraSettings(initial_fraction=0.0, final_fraction=0.0)
    assert prepare(base(), job("adalora", adalora=settings), 1)


def adalora_layers() -> list[AdaLoraLayer]:
    model = prepare(base(), job("adalora"), 100).model
    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]


def test_masked_ranks_of_adalora_do_not_count() -> None:
    layers = adalora_layers()
    for layer in layers:
        layer.lora_E["default"].data.fill_(0.5)
    whole = unmasked_parameters(layers)
    assert whole == 3 * (COST + 7)
    layers[0].lora_E["default"].data[1] = 0
    assert unmasked_parameters(layers) == whole - 33


def test_the_penalty_is_the_mean_distance_from_orthogonality() -> None:
    layers = adalora_layers()
    distances = []
    for layer in layers:
        a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        for gram in (a @ a.T, b.T @ b):
            distances.append(float(((gram - torch.eye(3)) ** 2).sum().sqrt()))
    found = orthogonality_penalty(layers, 0.5).detach()
    assert float(found) == pytest.approx(0.5 * sum(distances) / len(distances))
    for layer in layers:
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            torch.nn.init.orthogonal_(factor)
    assert float(orthogonality_penalty(layers, 0.5).detach()) == pytest.approx(0, abs=1e-5)


def test_the_penalty_is_the_one_that_peft_adds_to_its_own_loss() -> None:
    prepared = prepare(base(), job("adalora", adalora=AdaLoraSettings(orth_reg_weight=0.7)), 100)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    prepared.model.eval()
    outputs = prepared.model(**inputs)
    task = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"])
    assert prepared.penalty is not None
    assert torch.isclose(outputs.loss, task + prepared.penalty(), rtol=1e-5)


def test_lora_on_an_embedding_is_counted_too() -> None:
    config = job("lora", lora=LoraSettings(r=2, target_modules=("word_embeddings",)))
    assert lora_parameters(prepare(base(), config, 100).model) == 2 * (20 + 16)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("kye",), "'kye', which matches none .* nearest valid name is 'key'"),
        (("LayerNorm",), r"got \[LayerNorm\] on a BertForSequenceClassification"),
        (("classifier",), r"got \[classifier\]"),
    ],
)
def test_targets_that_fit_nothing_are_refused(targets: tuple[str, ...], told: str) -> None:
    config = job(lora=LoraSettings(r=2, target_modules=targets))
    with pytest.raises(ConfigError, match=told) as error:
        prepare(base(), config, 100)
    assert "linear layers end in classifier, dense, key, query, value" in str(error.value)


def test_a_module_to_save_that_is_none_is_refused_with_the_nearest() -> None:
    config = job(lora=LoraSettings(r=2, modules_to_save=("word_embeding",)))
    told = "modules_to_save` must match .* got 'word_embeding', .* name is 'word_embeddings'"
    with pytest.raises(ConfigError, match=told):
        prepare(base(), config, 100)


def test_a_module_to_save_may_be_named_by_its_end_as_in_peft() -> None:
    config = job(lora=LoraSettings(r=2, modules_to_save=("embeddings.word_embeddings", "pooler")))
    model = prepare(base(), config, 100).model
    saved = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("word_embeddings.modules_to_save" in name for name in saved)
    assert any("pooler.modules_to_save" in name for name in saved)


def test_a_model_without_linear_layers_is_told_its_module_types() -> None:
    class Bare(torch.nn.Module):
        base_model_prefix = "mixer"

        def __init__(self) -> None:
            super().__init__()
            self.mixer = torch.nn.Conv1d(4, 4, 1)
            self.score = torch.nn.Conv1d(4, 2, 1)

    config = job("lora", lora=LoraSettings(r=2, target_modules=("query",)))
    with pytest.raises(ConfigError, match=r"it has none .* Conv1d \(2\)"):
        prepare(Bare(), config, 100)


def test_what_cannot_move_is_found_before_training() -> None:
    from dynlora import DynamicLoraConfig

    with pytest.raises(BudgetError, match=r"takes? .*\[768, "):
        prepare(base(), job(dynamic=DynamicLoraConfig(min_rank=3)), 100)
