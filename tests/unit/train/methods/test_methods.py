"""The four methods, from the base model to what the Trainer gets."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dynlora.errors import ConfigError
from dynlora.train.methods.adapter import lora_parameters
from dynlora.train.methods.prepare import prepare
from tests.jobs import minimal_job

LORA = {"r": 2, "lora_alpha": 4}


def bert():
    """Return a random BERT of one block."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )
    )  # fmt: skip


def prepared(method="dynamic", steps=100, lora=LORA, **sections):
    return prepare(bert(), minimal_job(method=method, lora=lora, **sections), steps)


def test_the_check_that_ranks_can_move_leaves_no_hook_behind():
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in prepared().model.modules()]
    assert not any(map(any, hooks))


def test_adaloras_settings_follow_from_the_targets_rank_and_the_steps():
    config = prepared("adalora").model.peft_config["default"]
    assert (config.init_r, config.target_r) == (3, 2)
    assert (config.tinit, config.tfinal, config.total_step) == (10, 30, 100)
    assert config.lora_alpha / config.init_r == 4 / 2, "its scale is that of LoRA"
    settings = {"initial_fraction": 0.7, "final_fraction": 0.3}  # rounded, 0.3 < 1 - 0.7
    assert prepared("adalora", 1, adalora=settings)
    with pytest.raises(ConfigError, match="got none in 10 steps with 7 before and 3 after"):
        prepared("adalora", 10, adalora=settings)


def test_the_penalty_is_the_one_that_peft_adds_to_its_own_loss():
    found = prepared("adalora", adalora={"orth_reg_weight": 0.7})
    labels = torch.tensor([1])
    outputs = found.model.eval()(input_ids=torch.tensor([[1, 2, 3]]), labels=labels)
    task = torch.nn.functional.cross_entropy(outputs.logits, labels)
    assert torch.isclose(outputs.loss, task + found.penalty(), rtol=1e-5)


def test_lora_on_an_embedding_is_counted_too():
    found = prepared("lora", lora={"r": 2, "target_modules": ["word_embeddings"]})
    assert lora_parameters(found.model) == 2 * (20 + 16)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (
            {"target_modules": ["classifier"]},
            r"got \[classifier\] .* in classifier, dense, key",
        ),
        ({"modules_to_save": ["word_embeding"]}, "'word_embeding', .* name is 'word_embeddings'"),
    ],
)
def test_names_that_fit_nothing_are_refused(lora, told):
    with pytest.raises(ConfigError, match=told):
        prepared(lora=lora)


def test_a_module_to_save_may_be_named_by_any_end_as_in_peft():
    model = prepared(lora={"modules_to_save": ["embeddings.word_embeddings", "pooler"]}).model
    saved = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for name in ("word_embeddings", "pooler"):
        assert any(f"{name}.modules_to_save" in full for full in saved)


def test_a_model_without_linear_layers_is_told_its_layers():
    class Bare(torch.nn.Module):
        base_model_prefix = "mixer"

        def __init__(self):
            super().__init__()
            self.mixer = torch.nn.Conv1d(4, 4, 1)
            self.score = torch.nn.Conv1d(4, 2, 1)

    config = minimal_job(method="lora", lora={"target_modules": ["query"]})
    with pytest.raises(ConfigError, match="layers end in mixer, score"):
        prepare(Bare(), config, 100)
