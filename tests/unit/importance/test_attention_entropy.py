"""`attention_entropy`: one minus the normalised entropy of attention's rows."""

import math

import pytest
import torch

from dynlora.adapters.attention import attention_rows
from dynlora.importance.attention_entropy import DECAY, AttentionEntropyMetric, focus
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain

NONE_HIDDEN = torch.ones(1, 1, 4, dtype=torch.bool)


def row(*weights: float) -> torch.Tensor:
    """Return one head's logits of one token, from what its softmax shall be."""
    return torch.tensor(weights, dtype=torch.float64).log()[None, None]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.25, 0.25, 0.25, 0.25), 0.0),
        ((1.0, 0.0, 0.0, 0.0), 1.0),
        ((0.5, 0.5, 0.0, 0.0), 0.5),  # log 2 of log 4
        ((0.7, 0.1, 0.1, 0.1), 1 + (0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)),
    ],
)
def test_focus_is_one_minus_the_entropy_over_its_most(weights, expected):
    total, rows = focus(row(*weights), NONE_HIDDEN)
    assert float(total) == pytest.approx(expected, abs=1e-12)
    assert float(rows) == 1


def test_hidden_keys_do_not_count():
    visible = torch.tensor([[[True, True, False, False]]])
    logits = torch.tensor([[[0.3, 0.3, 50.0, -2.0]]])
    total, _ = focus(logits, visible)
    assert float(total) == pytest.approx(0, abs=1e-12), "both visible keys are looked at alike"


def test_rows_without_a_choice_are_left_out():
    visible = torch.tensor([[[True, False, False], [True, True, False], [False, False, False]]])
    total, rows = focus(torch.zeros(2, 3, 3), visible)
    assert (float(total), float(rows)) == (0.0, 2.0), "the second row of both heads"


def test_what_is_no_number_is_never_averaged_in():
    (layer,) = layers_of(lora_chain(8, 8))
    metric = AttentionEntropyMetric()
    metric.attend([layer.name], torch.full((1, 1, 4), torch.nan), NONE_HIDDEN)
    metric.observe([layer])
    assert metric.scores([layer], {}) == {}
    metric.attend([layer.name], row(0.5, 0.5, 0.0, 0.0), NONE_HIDDEN)
    metric.observe([layer])
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(0.5)}


def test_a_batch_without_examples_is_shown_and_changes_nothing():
    (layer,) = layers_of(lora_chain(8, 8))
    query, key = torch.zeros(0, 2, 5, 4), torch.zeros(0, 1, 5, 4)
    ((logits, visible),) = attention_rows(query, key, None, causal=True, options={})
    assert (logits.shape, visible.shape) == ((2, 0, 5), (1, 0, 5))
    metric = AttentionEntropyMetric()
    metric.attend([layer.name], logits, visible)
    metric.observe([layer])
    assert metric.scores([layer], {}) == {}


def test_forwards_of_one_step_count_by_their_rows_and_steps_by_their_age():
    (layer,) = layers_of(lora_chain(8, 8))
    metric = AttentionEntropyMetric()
    focused, even = row(1.0, 0.0, 0.0, 0.0), row(0.25, 0.25, 0.25, 0.25)
    metric.attend([layer.name], focused.expand(3, 1, 4), NONE_HIDDEN)
    metric.attend([layer.name], even, NONE_HIDDEN)
    metric.observe([layer])
    metric.observe([layer])  # a step that shows nothing changes nothing
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(3 / 4)}
    metric.attend([layer.name], even, NONE_HIDDEN)
    metric.observe([layer])
    expected = 3 / 4 * DECAY / (1 + DECAY)
    assert metric.scores([layer], {}) == {layer.name: pytest.approx(expected)}


def test_a_layer_without_attention_is_left_out_and_ranks_do_not_matter():
    first, second = layers_of(lora_chain(8, 8, 8))
    metric = AttentionEntropyMetric()
    metric.attend([first.name], row(0.5, 0.5, 0.0, 0.0), NONE_HIDDEN)
    metric.observe([first, second])
    metric.rebase(BasisChange(name=first.name, to_A=torch.eye(2, 4), to_B=torch.eye(4, 2)))
    assert metric.scores([first, second], {}) == {first.name: pytest.approx(0.5)}


def test_a_restored_metric_continues_bit_for_bit():
    (layer,) = layers_of(lora_chain(8, 8))
    saved, restored = AttentionEntropyMetric(), AttentionEntropyMetric()
    for step in range(6):
        torch.manual_seed(step)
        logits = torch.randn(2, 1, 4)
        for metric in (saved, restored) if step >= 3 else (saved,):
            metric.attend([layer.name], logits, NONE_HIDDEN)
            metric.observe([layer])
        if step == 2:
            restored.load_state_dict(saved.state_dict())
    assert restored.scores([layer], {}) == saved.scores([layer], {})
