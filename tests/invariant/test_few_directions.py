"""Invariant 11: where gradients have few directions a layer takes little, whatever it scores."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from dynlora import DynamicLora, DynamicLoraConfig
from tests.models import adamw, train

POOLER = "bert.pooler.dense"
R, STEPS = 4, 120


def train_classifier(*, classes, seed):
    """Let a random BERT with a frozen head tell the first token's remainder."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        num_labels=classes,
    )
    base = BertForSequenceClassification(config)
    for name, weight in base.named_parameters():
        if weight.dim() == 2 and "embeddings" not in name:
            weight.data.mul_(3)
    adapter = LoraConfig(r=R, lora_alpha=R, target_modules=r"bert.*(query|key|value|dense)")
    model = get_peft_model(base, adapter)
    optimizer = adamw(model)
    dynamic = DynamicLora(
        model, optimizer, DynamicLoraConfig(total_steps=STEPS, first_event=0.2, last_event=0.6)
    )
    generator = torch.Generator().manual_seed(seed)
    batches = (torch.randint(0, 64, (32, 8), generator=generator) for _ in range(STEPS))

    def loss(model, tokens):
        logits = model(input_ids=tokens).logits
        return functional.cross_entropy(logits, tokens[:, 0] % classes)

    train(model, optimizer, dynamic, STEPS, batches, loss=loss)
    return dynamic


def pooler(event):
    return next(layer for name, layer in event.layers.items() if name.endswith(POOLER))


def asked_for(dynamic, event):
    """Return the rank that the pooler's share of the budget would pay."""
    cost = next(layer.cost for layer in dynamic._layers if layer.name.endswith(POOLER))
    return pooler(event).share * dynamic.budget / cost


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_below_a_head_of_two_classes_a_layer_takes_little_though_it_scores_highest(seed):
    dynamic = train_classifier(classes=2, seed=seed)
    event = next(e for e in dynamic.history if pooler(e).score is not None)
    assert pooler(event).score == max(layer.score for layer in event.layers.values())
    assert asked_for(dynamic, event) > 4 * R
    assert pooler(event).directions < 1.5
    assert max(pooler(e).rank_after for e in dynamic.history) <= 2 * R


def test_below_a_head_of_many_classes_it_takes_what_it_asks_for():
    dynamic = train_classifier(classes=16, seed=0)
    assert pooler(dynamic.history[-1]).directions > 4
    assert pooler(dynamic.history[-1]).rank_after > 4 * R
