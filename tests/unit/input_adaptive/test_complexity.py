"""Complexity: an exact variance whatever the batch, the padding and the cuts; quartiles; masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import LayerError
from dynlora.input_adaptive.complexity import (
    FEATURE_BITS,
    ComplexitySample,
    ComponentMask,
    Features,
    components_used,
    in_units,
    quarter_of,
    running_variance,
    unit_for,
)

TABLE = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
UNIT = unit_for(float(TABLE.abs().max()))


def features_of(ids, table=TABLE, unit=UNIT):
    return Features(
        width=table.shape[1], unit=unit, read=lambda c: in_units(table[:, c][ids], unit)
    )


def variances(tokens):
    ids = torch.tensor([tokens])
    return running_variance(features_of(ids), torch.ones_like(ids, dtype=torch.bool))[0][0]


def test_at_each_token_it_is_the_mean_unbiased_variance_of_the_features_so_far():
    tokens = [3, 17, 17, 40, 8, 3, 29]
    found = variances(tokens)
    assert math.isnan(found[0])
    for count in range(2, len(tokens) + 1):
        expected = np.var(TABLE[tokens[:count]].double().numpy(), axis=0, ddof=1).mean()
        assert found[count - 1] == pytest.approx(expected, rel=1e-3)


EXAMPLES = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=12), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(examples=EXAMPLES, left=st.integers(0, 5), right=st.integers(0, 5), holes=st.booleans())
def test_an_example_has_the_same_bits_in_any_batch_under_any_padding(examples, left, right, holes):
    longest = max(map(len, examples))
    ids = torch.full((len(examples), left + 2 * longest + right), 13)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        gap = 2 if holes else 1
        places = slice(left, left + gap * len(example), gap)
        ids[row, places], mask[row, places] = torch.tensor(example), True
    together, _ = running_variance(features_of(ids), mask)
    for row, example in enumerate(examples):
        own = together[row][mask[row]]
        assert torch.equal(own.nan_to_num(-1), variances(example).nan_to_num(-1))


@settings(max_examples=20, deadline=None)
@given(tokens=st.lists(st.integers(0, 49), min_size=2, max_size=15), data=st.data())
def test_going_on_from_a_prefix_gives_the_same_bits_as_reading_at_once(tokens, data):
    cut = data.draw(st.integers(1, len(tokens) - 1))
    found, prefix = [], None
    for part in (tokens[:cut], tokens[cut:]):
        ids = torch.tensor([part])
        mask = torch.ones_like(ids, dtype=torch.bool)
        variance, prefix = running_variance(features_of(ids), mask, prefix)
        found.append(variance[0])
    assert torch.equal(torch.cat(found).nan_to_num(-1), variances(tokens).nan_to_num(-1))


def test_the_longest_sums_of_the_largest_features_do_not_overflow():
    largest = float(1 << FEATURE_BITS)
    table = torch.tensor([[largest], [-largest]]).expand(2, 64)
    ids = torch.arange(1 << 14).remainder(2)[None]
    variance, prefix = running_variance(
        features_of(ids, table, 1.0), torch.ones_like(ids, dtype=torch.bool)
    )
    assert variance[0, -1] == pytest.approx(largest**2, rel=1e-3)
    # 2 ** 4 times as many tokens and 2 ** 8 times as many features still fit.
    assert int(prefix.squares[0]) < 2**63 >> 12


def test_the_quarter_counts_the_thresholds_that_are_reached():
    complexity = torch.tensor([0.5, 1.0, 2.5, 9.0, math.nan], dtype=torch.float64)
    assert quarter_of(complexity, (1.0, 2.0, 3.0)).tolist() == [0, 1, 2, 3, 3]
    assert quarter_of(complexity, ()).tolist() == [3] * 5
    assert quarter_of(complexity, (1.0, 1.0, 1.0)).tolist() == [0, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("r", "used"), [(1, (1, 1, 1, 1)), (2, (1, 1, 2, 2)), (5, (2, 3, 4, 5)), (8, (2, 4, 6, 8))]
)
def test_each_quarter_uses_more_components_and_the_last_all(r, used):
    assert components_used(r) == used


def test_thresholds_are_the_quartiles_of_what_was_seen():
    sample = ComplexitySample()
    assert sample.thresholds() == ()
    values = torch.arange(101.0, dtype=torch.float64)
    sample.observe(torch.randperm(101), values[torch.randperm(101)])
    assert sample.thresholds() == (25.0, 50.0, 75.0)


def test_the_sample_does_not_depend_on_batches_or_their_order():
    keys, values = torch.randperm(3000), torch.randn(3000, dtype=torch.float64)
    whole, parts = ComplexitySample(), ComplexitySample()
    whole.observe(keys, values)
    for start, end in ((2100, 3000), (7, 2100), (0, 7)):
        parts.observe(keys[start:end], values[start:end])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name])
    again = ComplexitySample()
    again.load_state_dict(whole.state_dict())
    assert again.thresholds() == whole.thresholds() != ()


def test_a_sample_is_on_the_cpu_whatever_device_is_the_default():
    with torch.device("meta"):
        sample = ComplexitySample()
        sample.observe(torch.tensor([3, 1], device="cpu"), torch.ones(2, device="cpu").double())
        assert sample.thresholds() == (1.0, 1.0, 1.0)


def layer_on(name):
    net = nn.ModuleDict({"linear": nn.Linear(3, 3), "conv": nn.Conv2d(3, 3, 1)})
    return find_lora_layers(get_peft_model(net, LoraConfig(r=4, target_modules=[name])), None)[0]


QUARTERS = torch.tensor([0, 3])
TOKENS = torch.tensor([[0, 1, 2], [3, 0, 3]])


@pytest.mark.parametrize(
    ("name", "quarter", "shape"),
    [
        ("linear", QUARTERS, (2, 4)),
        ("linear", QUARTERS, (2, 3, 4)),
        ("linear", QUARTERS, (2, 5, 6, 4)),
        ("linear", QUARTERS, (6, 4)),
        ("conv", QUARTERS, (2, 4, 5, 6)),
        ("linear", TOKENS, (2, 3, 4)),
        ("linear", TOKENS, (6, 4)),
    ],
)
def test_each_row_keeps_the_first_components_of_its_own_quarter(name, quarter, shape):
    mask = ComponentMask(quarter=quarter, rows=(2, 3))
    output = torch.ones(shape)
    kept = output * mask.of(layer_on(name), output)
    rows = kept.movedim(1, -1) if name == "conv" else kept
    per_row = quarter if quarter.dim() == 2 else quarter[:, None].expand(2, 3)
    for row, values in enumerate(rows.reshape(6 if shape[0] == 6 else 2, -1, 4)):
        for column, components in enumerate(values):
            if shape[0] == 6:
                own = per_row.flatten()[row]
            else:
                own = quarter[row] if quarter.dim() == 1 else quarter[row, column]
            used = int(own) + 1  # of 4 components, a quarter is one
            assert components.tolist() == [1.0] * used + [0.0] * (4 - used)


@pytest.mark.parametrize(
    ("name", "quarter", "shape"),
    [
        ("linear", TOKENS, (2, 4)),
        ("linear", TOKENS, (5, 4)),
        ("linear", TOKENS, (2, 3, 7, 4)),
        ("linear", QUARTERS, (1, 3, 4)),
        ("conv", TOKENS, (2, 4, 3, 3)),
    ],
)
def test_rows_that_are_not_the_batch_are_refused_with_both_shapes(name, quarter, shape):
    mask = ComponentMask(quarter=quarter, rows=(2, 3))
    expected = rf"'{name}' must see the tokens of the batch, \(2, 3\), got rows of shape"
    with pytest.raises(LayerError, match=expected):
        mask.of(layer_on(name), torch.ones(shape))
