"""The feature analyzer: which tokens stay, and what is computed from them, by closed form."""

import pytest
import torch

from dynlora.features import InputFeatureAnalyzer, input_limits
from dynlora.types import SAMPLE_SIZE, UNUSED_KEY, FeatureStats


def tokens_with_keys(count, *, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, width, generator=generator)
    outputs = torch.randn(count, 3, generator=generator)
    keys = torch.randperm(10 * count, generator=generator)[:count]
    return inputs, outputs, keys


def offer(analyzer, name, inputs, outputs, keys):
    analyzer.observe(name, keys, lambda index: (inputs[index], outputs[index]))


def stats_of(*given):
    """Return the statistics of one layer that is offered this once."""
    analyzer = InputFeatureAnalyzer()
    offer(analyzer, "layer", *given)
    return analyzer.stats()["layer"]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_tokens_with_the_smallest_keys_stay_in_any_batching_and_order(chunk):
    inputs, outputs, keys = tokens_with_keys(SAMPLE_SIZE + 200)
    analyzer = InputFeatureAnalyzer()
    for part in torch.randperm(len(keys)).split(chunk):
        offer(analyzer, "layer", inputs[part], outputs[part], keys[part])
    smallest, state = keys.argsort()[:SAMPLE_SIZE], analyzer.state_dict()
    assert torch.equal(state["layer/keys"], keys[smallest])
    assert torch.equal(state["layer/tokens"], inputs[smallest])


def test_padding_is_in_no_statistic_and_displaces_no_token():
    inputs, outputs, keys = tokens_with_keys(20)
    padded = InputFeatureAnalyzer()
    pads = torch.full((2 * SAMPLE_SIZE,), UNUSED_KEY)
    wide = 1e6 * torch.ones(len(pads), 6)
    offer(padded, "only padding", wide, wide, pads)
    offer(padded, "layer", wide, wide[:, :3], pads)
    offer(
        padded,
        "layer",
        torch.cat([inputs, wide[:30]]),
        torch.cat([outputs, wide[:30, :3]]),
        torch.cat([keys, pads[:30]]),
    )
    assert set(padded.stats()) == {"layer"}
    with_padding, without = padded.stats()["layer"], stats_of(inputs, outputs, keys)
    assert torch.equal(with_padding.tokens, inputs[keys.argsort()])
    assert with_padding.variance == without.variance
    assert with_padding.output_power == without.output_power


@pytest.mark.parametrize("count", [5, 50])  # fewer and more than dimensions
def test_statistics_are_those_of_the_sampled_tokens(count):
    inputs, outputs, keys = tokens_with_keys(count)
    stats = stats_of(inputs, outputs, keys)
    centred = inputs - inputs.mean(dim=0)
    assert stats.variance == pytest.approx(float((centred**2).sum() / count / 6), rel=1e-6)
    assert stats.output_power == pytest.approx(float((outputs**2).sum() / count), rel=1e-6)
    singular = torch.linalg.svdvals(centred.double()) ** 2
    p = singular / singular.sum()
    assert stats.effective_rank == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-5)


def test_half_precision_inputs_are_sampled_in_float32():
    inputs, outputs, keys = tokens_with_keys(8)
    tokens = stats_of(inputs.bfloat16(), outputs.bfloat16(), keys).tokens
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, inputs.bfloat16().float()[keys.argsort()])


@pytest.mark.parametrize(("place", "value"), [(0, float("nan")), (1, float("inf"))])
def test_a_layer_whose_input_or_output_is_not_finite_has_no_statistics(place, value):
    inputs, outputs, keys = tokens_with_keys(8)
    (inputs, outputs)[place][3, 2] = value
    analyzer = InputFeatureAnalyzer()
    offer(analyzer, "broken", inputs, outputs, keys)
    offer(analyzer, "whole", inputs[:3], outputs[:3], keys[:3])
    assert set(analyzer.stats()) == {"whole"}


def test_after_a_restart_old_tokens_serve_until_new_ones_come_after_a_resume_too():
    inputs, outputs, keys = tokens_with_keys(40)
    saved, restored = InputFeatureAnalyzer(), InputFeatureAnalyzer()

    def observe(analyzer, name, start, end):
        offer(analyzer, name, *(part[start:end] for part in (inputs, outputs, keys)))

    for name in ("a.b", "stale", "unseen"):
        observe(saved, name, 0, 10)
    saved.restart()
    observe(saved, "a.b", 10, 20)
    restored.load_state_dict(saved.state_dict())
    for analyzer in (saved, restored):
        for name in ("a.b", "stale"):
            observe(analyzer, name, 20, 40)
        stats = analyzer.stats()
        for name, (start, end) in {"a.b": (10, 40), "stale": (20, 40), "unseen": (0, 10)}.items():
            order = keys[start:end].argsort()
            assert torch.equal(stats[name].tokens, inputs[start:end][order])
    ours, theirs = saved.state_dict(), restored.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("rank", "limited"), [(7.9, True), (8.0, False)])
def test_an_input_limits_growth_if_the_sample_is_more_than_twice_its_effective_rank(rank, limited):
    stats = FeatureStats(
        tokens=torch.zeros(16, 100), variance=1.0, effective_rank=rank, output_power=1.0
    )
    assert input_limits({"layer": stats}) == ({"layer": rank} if limited else {})


def rank_of(tokens):
    """Return the effective rank that the analyzer finds for these inputs."""
    return stats_of(tokens, torch.ones(len(tokens), 1), torch.arange(len(tokens))).effective_rank


@pytest.mark.parametrize("tokens", [torch.zeros(5, 4), torch.full((5, 4), 2.5), torch.ones(1, 4)])
def test_a_constant_input_has_effective_rank_one(tokens):
    assert rank_of(tokens) == 1.0


def test_ids_count_as_one_hot_vectors_over_those_sampled():
    ids = torch.tensor([7, 7, 7, 40_000, 2, 2])
    stats = stats_of(ids, torch.ones(6, 4), torch.arange(6))
    assert torch.equal(stats.tokens, ids)
    shares = torch.tensor([1 / 2, 1 / 6, 1 / 3], dtype=torch.float64)
    covariance = shares.diag() - torch.outer(shares, shares)
    spectrum = torch.linalg.eigvalsh(covariance)[1:]
    p = spectrum / spectrum.sum()
    assert stats.variance == pytest.approx(float(covariance.trace()) / 3, rel=1e-5)
    assert stats.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-5)


def test_only_the_tokens_that_are_kept_are_read():
    read = []
    analyzer = InputFeatureAnalyzer()

    def reader(index):
        read.append(index)
        return torch.ones(len(index), 6), torch.ones(len(index), 3)

    keys = torch.arange(1000).flip(0)
    analyzer.observe("layer", keys, reader)
    assert torch.equal(read[0].sort().values, torch.arange(1000 - SAMPLE_SIZE, 1000))
