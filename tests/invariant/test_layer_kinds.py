"""What a shrink loses, and what becomes of moments, for every kind of layer."""

import pytest
import torch
from torch.optim import SGD, AdamW, Muon

from dynlora import RankPlan
from tests.layer_kinds import CASES
from tests.models import adamw, attached, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def all_at(dynamic, rank):
    return RankPlan(step=0, ranks=dict.fromkeys(dynamic.ranks, rank))


def delta(layer):
    """Return what PEFT would merge, as a matrix from tokens to what is added, or one per expert."""
    module = layer.module
    merged = module.get_delta_weight(layer.adapter).double()
    if type(module.get_base_layer()).__name__ in ("Conv1D", "Embedding"):
        return merged.T  # (in, out) there
    return merged.flatten(1) if merged.dim() == 4 else merged


def vectors(layer, features):
    """Return observed tokens as rows whose squares add up to the mean that a shrink must keep.

    Ids are one-hot rows; those seen once, and one more, stand for all that were not seen. Without
    tokens, as of experts, all inputs count equally.
    """
    if layer.name not in features:
        return torch.eye(layer.module.in_features, dtype=torch.float64)
    tokens = features[layer.name].tokens
    n = len(tokens)
    if tokens.is_floating_point():
        return tokens.double() / n**0.5
    ids = layer.module.in_features
    unseen = (sum(tokens.tolist().count(i) == 1 for i in range(ids)) + 1) / (n + 1)
    one_hot = torch.nn.functional.one_hot(tokens, ids).double()
    every = torch.eye(ids, dtype=torch.float64)
    return torch.cat([((1 - unseen) / n) ** 0.5 * one_hot, (unseen / ids) ** 0.5 * every])


@torch.no_grad()
def test_shrinking_loses_the_least_on_the_observed_inputs_and_says_how_much(case):
    model = case.model().train()
    optimizer = adamw(model, lr=2e-2)
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    with torch.enable_grad():
        train(model, optimizer, dynamic, 30, case.batches())
    features = dynamic._analyzer.stats()
    assert dynamic.ranks.keys() - features.keys() == {n for n in dynamic.ranks if "experts" in n}
    seen = {x.name: vectors(x, features) for x in dynamic._layers}
    before = {x.name: seen[x.name] @ delta(x).mT for x in dynamic._layers}
    event = dynamic.apply(all_at(dynamic, 2))
    for layer in dynamic._layers:
        name = layer.name
        tail = float(torch.linalg.svdvals(before[name])[..., 2:].norm())  # dense oracle
        assert tail > 0
        error = float((seen[name] @ delta(layer).mT - before[name]).norm())
        assert error == pytest.approx(tail, rel=1e-3)
        if name in features:
            relative = tail / features[name].output_power ** 0.5
        else:
            relative = tail / float(layer.module.get_param().norm())
        assert event.layers[name].output_lost == pytest.approx(relative, rel=1e-3)


def first_moments(case, make, key, *, resize_first):
    """Return moments after 8 steps with a learning rate of 0, and resizes before or after them."""
    model = case.model().train()
    optimizer = make(trainable(model))
    dynamic = attached(model, optimizer, importance="uniform", total_steps=1000)
    for layer in dynamic._layers:
        generator = torch.Generator().manual_seed(len(layer.name))
        B = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
        A = layer.lora_A.detach().clone()
        # Rank 3, so that the shrink loses nothing.
        A[..., 3, :], B[..., 3] = A[..., 0, :] - A[..., 1, :], B[..., 2]
        for factor, matrix in ((layer.factor_A, A), (layer.factor_B, B)):
            factor.parameter.data.copy_(factor.from_matrix(matrix))
    dynamic.freeze()  # no tokens: the same change whenever it comes

    def resized():
        dynamic.apply(all_at(dynamic, 3))
        dynamic.apply(RankPlan(step=0, ranks={case.layer: 4}))

    if resize_first:
        resized()
    train(model, optimizer, None, 8, case.batches())
    if not resize_first:
        resized()
    return {
        (layer.name, rank_axis): factor.to_matrix(optimizer.state[factor.parameter][key])
        for layer in dynamic._layers
        for rank_axis, factor in ((-2, layer.factor_A), (-1, layer.factor_B))
    }


@pytest.mark.parametrize(
    ("kind", "make", "key", "rtol"),
    [
        *((kind, lambda ps: AdamW(ps, lr=0.0), "exp_avg", 2e-3) for kind in CASES),
        ("Linear", lambda ps: SGD(ps, lr=0.0, momentum=0.9), "momentum_buffer", 2e-3),
        ("Linear", lambda ps: Muon(ps, lr=0.0, weight_decay=0.0), "momentum_buffer", 1e-4),
    ],
)
def test_first_moments_are_those_that_training_in_the_new_basis_would_have(kind, make, key, rtol):
    case = CASES[kind]
    carried = first_moments(case, make, key, resize_first=False)
    trained = first_moments(case, make, key, resize_first=True)
    assert carried.keys() == trained.keys()
    for (name, rank_axis), moment in trained.items():
        # What was grown has seen no gradient in the one, and eight in the other.
        ours, theirs = (m.narrow(rank_axis, 0, 3) for m in (carried[name, rank_axis], moment))
        atol = 2e-6 if key == "exp_avg" else 1e-6 + 1e-4 * float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        assert theirs.any()
