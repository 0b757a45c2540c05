"""Complexity: an exact variance whatever the batch, the padding and the cuts; its quartiles."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlora.input_adaptive.complexity import (
    FEATURE_BITS,
    ComplexitySample,
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


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=40, deadline=None)
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


def test_without_thresholds_or_with_equal_ones_all_are_in_the_highest_quarter():
    same = torch.full((4,), 1.25, dtype=torch.float64)
    assert quarter_of(same, ()).tolist() == [3] * 4
    assert quarter_of(same, (1.25, 1.25, 1.25)).tolist() == [3] * 4


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


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 2999), max_size=6), seed=st.integers(0, 99))
def test_the_sample_does_not_depend_on_batches_or_their_order(cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(3000, generator=generator)
    values = torch.randn(3000, generator=generator, dtype=torch.float64)
    whole, parts = ComplexitySample(), ComplexitySample()
    whole.observe(keys, values)
    edges = [0, *sorted(set(cuts)), 3000]
    for start, end in reversed(list(pairwise(edges))):
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
