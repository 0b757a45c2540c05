"""`attention_entropy`: one minus the normalised entropy of attention's rows."""

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


def test_hidden_keys_and_rows_without_a_choice_do_not_count():
    visible = torch.tensor([[[True, True, False, False]]])
    total, _ = focus(torch.tensor([[[0.3, 0.3, 50.0, -2.0]]]), visible)
    assert float(total) == pytest.approx(0, abs=1e-12), "both visible keys are looked at alike"
    visible = torch.tensor([[[True, False, False], [True, True, False], [False, False, False]]])
    total, rows = focus(torch.zeros(2, 3, 3), visible)
    assert (float(total), float(rows)) == (0.0, 2.0), "the second row of both heads"


@pytest.fixture
def show():
    """Return a metric's scores of two layers after a step that shows the first this attention."""
    metric, (first, second) = AttentionEntropyMetric(), layers_of(lora_chain(8, 8, 8))

    def show(*shown, visible=NONE_HIDDEN):
        for logits in shown:
            metric.attend([first.name], logits, visible)
        metric.observe([first, second])
        metric.rebase(BasisChange(name=first.name, to_A=torch.eye(2, 4), to_B=torch.eye(4, 2)))
        return metric.scores([first, second], {})

    show.metric = metric
    return show


def test_what_is_no_number_is_never_averaged_in(show):
    assert show(torch.full((1, 1, 4), torch.nan)) == {}
    assert show(row(0.5, 0.5, 0.0, 0.0)) == {"0": pytest.approx(0.5)}


def test_a_batch_without_examples_is_shown_and_changes_nothing(show):
    query, key = torch.zeros(0, 2, 5, 4), torch.zeros(0, 1, 5, 4)
    ((logits, visible),) = attention_rows(query, key, None, causal=True, options={})
    assert (logits.shape, visible.shape) == ((2, 0, 5), (1, 0, 5))
    assert show(logits, visible=visible) == {}


def test_forwards_of_one_step_count_by_their_rows_and_steps_by_their_age(show):
    focused, even = row(1.0, 0.0, 0.0, 0.0), row(0.25, 0.25, 0.25, 0.25)
    assert show(focused.expand(3, 1, 4), even) == {"0": pytest.approx(3 / 4)}
    assert show() == {"0": pytest.approx(3 / 4)}  # a step that shows nothing changes nothing
    restored = AttentionEntropyMetric()
    restored.load_state_dict(show.metric.state_dict())
    scores = show(even)
    assert scores == {"0": pytest.approx(3 / 4 * DECAY / (1 + DECAY))}
    restored.attend(["0"], even, NONE_HIDDEN)
    layers = layers_of(lora_chain(8, 8))
    restored.observe(layers)
    assert restored.scores(layers, {}) == scores
