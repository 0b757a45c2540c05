"""Moments after a change of rank against those of gradients worked out again in the new basis.

Each step has a gradient G with respect to the full update ``scaling * B @ A``; the gradients of A
and B follow from it by the chain rule in any basis. The learning rate is 0 while moments build up,
so the moments that the new basis would have seen can be written out from G alone.
"""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.adapters.resize import apply_change, reorder_change
from dynlora.adapters.strengths import measure_strengths
from dynlora.types import RankPlan
from tests.lora_layers import layers_of, lora_chain, stats_of

N_IN, N_OUT, R, STEPS = 12, 8, 4, 25
BETA1, BETA2 = 0.9, 0.999
MEMORY = 10  # steps that moments stand for after a change of basis, at most
MOMENTUM_SHARE = 0.7  # of a learning rate: what momentum alone may take right after an event

ADAMS = {
    "Adam": Adam,
    "AdamW": AdamW,
    "AdamW foreach": lambda ps, **kw: AdamW(ps, foreach=True, **kw),
    "AdamW fused": lambda ps, **kw: AdamW(ps, fused=True, **kw),
    "AdamW amsgrad": lambda ps, **kw: AdamW(ps, amsgrad=True, **kw),
}
TOKENS = torch.randn(60, N_IN, generator=torch.Generator().manual_seed(3)) * torch.logspace(
    0.7, -0.7, N_IN
)


class Run:
    """One layer, its optimizer, and the full gradients that it has seen."""

    def __init__(self, make, *, lr=0.0, steady=0.5, untrained=()):
        self.model = lora_chain(N_IN, N_OUT, r=R)
        (self.layer,) = layers_of(self.model)
        self.layer.lora_B.data[:, list(untrained)] = 0
        self.optimizer = make([self.layer.lora_A, self.layer.lora_B], lr=lr)
        self.adapters = LoraAdapters(self.model, self.optimizer, None, follow=lambda change: None)
        self.seen = []
        self._generator = torch.Generator().manual_seed(7)
        self._steady = steady
        self._mean = self._draw()

    def _draw(self):
        """Return a gradient as a batch of the tokens makes it: errors times inputs."""
        rows = torch.randint(0, len(TOKENS), (16,), generator=self._generator)
        errors = torch.randn(16, N_OUT, generator=self._generator, dtype=torch.float64)
        return errors.T @ TOKENS[rows].double() / 16

    def step(self, count=1):
        for _ in range(count):
            gradient = self._steady * self._mean + (1 - self._steady) * self._draw()
            self.seen.append(gradient)
            self.layer.lora_A.grad, self.layer.lora_B.grad = in_basis(self.layer, gradient)
            self.optimizer.step()

    def moments(self, key):
        states = [self.optimizer.state[w] for w in (self.layer.lora_A, self.layer.lora_B)]
        return [state[key] for state in states]

    def resize(self, rank, tokens):
        features = {} if tokens is None else {"0": stats_of(self.layer, tokens)}
        self.adapters.apply(RankPlan(step=0, ranks={"0": rank}), features, seed=0)


def in_basis(layer, gradient):
    """Return dL/dA and dL/dB from dL/d(update), by the chain rule."""
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    return layer.scaling * B.T @ gradient, layer.scaling * gradient @ A.T


def averaged(gradients, beta):
    mean = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = beta * mean + (1 - beta) * gradient
    return mean


def summed(gradients):
    total = torch.zeros_like(gradients[0])
    for gradient in gradients:
        total = 0.9 * total + gradient
    return total


def highest(gradients):
    mean = top = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = BETA2 * mean + (1 - BETA2) * gradient**2
        top = torch.maximum(top, mean)
    return top


def rotate(run, tokens):
    [strengths] = measure_strengths([run.layer], [tokens])
    apply_change(run.layer, run.optimizer, reorder_change(run.layer, strengths))


CHANGES = {
    "growing": lambda run, tokens: run.resize(R + 3, tokens),
    "shrinking": lambda run, tokens: run.resize(R - 2, tokens),
    "rotating": rotate,
    "weighting": lambda run, tokens: run.adapters.apply_weights({"0": 1.6}),
}


PAIRS = [
    *(("AdamW", change) for change in CHANGES),
    ("Adam", "growing"),
    ("AdamW foreach", "shrinking"),
    ("AdamW fused", "rotating"),
    ("AdamW amsgrad", "shrinking"),
    ("AdamW amsgrad", "weighting"),
]
"""Every change for the default optimizer, and some change for each other."""


def steps_after(change, steps=STEPS):
    """Return the steps that moments stand for after a change: a new scale alone keeps them."""
    return steps if change == "weighting" else min(steps, MEMORY)


def cut(change, beta, steps=STEPS):
    """Return the factor on moments that keeps them the same over their bias correction."""
    return (1 - beta ** steps_after(change, steps)) / (1 - beta**steps)


def first_moments_in_the_new_basis(run, average):
    """Write out the first moments; grown columns of dB start from 0."""
    in_new = [in_basis(run.layer, gradient) for gradient in run.seen]
    moment_A, moment_B = (average([pair[k] for pair in in_new]) for k in (0, 1))
    moment_B[:, R:] = 0
    return moment_A, moment_B


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["unseen", "seen"])
@pytest.mark.parametrize(("kind", "change"), PAIRS)
def test_first_moments_are_those_of_the_gradients_in_the_new_basis(kind, change, tokens):
    run = Run(ADAMS[kind])
    run.step(STEPS)
    CHANGES[change](run, tokens)
    expected = first_moments_in_the_new_basis(run, lambda seen: averaged(seen, BETA1))
    for ours, theirs in zip(run.moments("exp_avg"), expected, strict=True):
        torch.testing.assert_close(ours, theirs * cut(change, BETA1), rtol=1e-9, atol=1e-12)
    assert [float(step) for step in run.moments("step")] == [steps_after(change)] * 2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_sgd_momentum_is_that_of_the_gradients_in_the_new_basis(change, nesterov):
    run = Run(lambda ps, lr: SGD(ps, lr=lr, momentum=0.9, nesterov=nesterov))
    run.step(STEPS)
    CHANGES[change](run, TOKENS)
    expected = first_moments_in_the_new_basis(run, summed)
    for ours, theirs in zip(run.moments("momentum_buffer"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def with_grown(carried, old, count):
    """Append grown rows, of zeros."""
    return torch.cat([carried, torch.zeros_like(old[:1]).expand(count, -1)])


@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["unseen", "seen"])
@pytest.mark.parametrize(("kind", "change"), PAIRS)
def test_second_moments_follow_by_the_squared_entries_of_the_map(kind, change, tokens):
    run = Run(ADAMS[kind])
    A, B, scaling = run.layer.lora_A.clone(), run.layer.lora_B.clone(), run.layer.scaling
    run.step(STEPS)
    before = [in_basis(run.layer, gradient) for gradient in run.seen]
    CHANGES[change](run, tokens)
    # The maps of the change, from the weights before and after it.
    kept = min(run.layer.r, R)
    ratio = run.layer.scaling / scaling
    new_A, new_B = run.layer.lora_A.detach(), run.layer.lora_B.detach()
    to_A, to_B = new_A[:kept] @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ new_B[:, :kept]
    first = first_moments_in_the_new_basis(run, lambda seen: averaged(seen, BETA1))
    # Over their corrections moments are what they were, so that the bound is one on those.
    correction = (1 - BETA2**STEPS) / (1 - BETA1**STEPS) ** 2 / MOMENTUM_SHARE**2
    keys = {"exp_avg_sq": lambda g: averaged([x**2 for x in g], BETA2)}
    if kind == "AdamW amsgrad":
        keys["max_exp_avg_sq"] = highest
    for key, average in keys.items():
        old_A, old_B = (average([pair[k] for pair in before]) for k in (0, 1))
        grown = run.layer.r - kept
        second_A = with_grown((ratio * to_B.T) ** 2 @ old_A, old_A, grown)
        second_B = with_grown((ratio * to_A) ** 2 @ old_B.T, old_B.T, grown).T
        for ours, carried, moment in zip(
            run.moments(key), (second_A, second_B), first, strict=True
        ):
            # A new scale alone is in both moments alike: there is nothing to bound.
            least = 0 * moment if change == "weighting" else moment**2 * correction
            expected = torch.maximum(carried, least) * cut(change, BETA2)
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("kind", ADAMS)
def test_dropping_untrained_directions_leaves_exact_second_moments(kind):
    run = Run(ADAMS[kind], steady=0.0, untrained=(1, 3))
    run.step(STEPS)
    run.resize(2, None)
    in_new = [in_basis(run.layer, gradient) for gradient in run.seen]
    correction = (1 - BETA2**STEPS) / (1 - BETA1**STEPS) ** 2 / MOMENTUM_SHARE**2
    for k, ours in enumerate(run.moments("exp_avg_sq")):
        gradients = [pair[k] for pair in in_new]
        exact = averaged([gradient**2 for gradient in gradients], BETA2)
        least = averaged(gradients, BETA1) ** 2 * correction
        expected = torch.maximum(exact, least) * cut("shrinking", BETA2)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("steady", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["unseen", "seen"])
@pytest.mark.parametrize(
    ("kind", "change"), [(kind, change) for kind, change in PAIRS if change != "weighting"]
)
def test_no_element_moves_over_one_learning_rate_in_the_first_step(kind, change, tokens, steady):
    settings = {"weight_decay": 0.0} if "AdamW" in kind else {}
    run = Run(lambda ps, lr: ADAMS[kind](ps, lr=lr, **settings), lr=1e-3, steady=steady)
    run.step(150)
    CHANGES[change](run, tokens)
    before = [weight.detach().clone() for weight in (run.layer.lora_A, run.layer.lora_B)]
    run.step()
    for old, new in zip(before, (run.layer.lora_A, run.layer.lora_B), strict=True):
        assert float((new.detach() - old).abs().max()) <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize("steady", [0.5, 1.0])
@pytest.mark.parametrize("kind", ADAMS)
def test_a_new_scale_alone_leaves_the_steps_of_both_factors_what_they_were(kind, steady):
    moved = []
    for weight in (1.0, 1.6):
        settings = {"weight_decay": 0.0} if "AdamW" in kind else {}
        run = Run(lambda ps, lr, kw=settings: ADAMS[kind](ps, lr=lr, **kw), lr=1e-3, steady=steady)
        run.step(150)
        run.adapters.apply_weights({"0": weight})
        before = [factor.detach().clone() for factor in (run.layer.lora_A, run.layer.lora_B)]
        run.step()
        moved.append([run.layer.lora_A - before[0], run.layer.lora_B - before[1]])
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in ADAMS if kind != "AdamW amsgrad"])
@pytest.mark.parametrize("early", [1.0, 100.0])
def test_a_grown_direction_learns_whatever_the_size_of_early_gradients(kind, early):
    settings = {"weight_decay": 0.0} if "AdamW" in kind else {}
    run = Run(lambda ps, lr: ADAMS[kind](ps, lr=lr, **settings), lr=1e-3, steady=1.0)
    mean, run._mean = run._mean, run._mean * early
    run.step(20)
    run._mean = mean
    run.resize(R + 2, TOKENS)
    run.step(10)
    # Under a steady gradient every element of a fresh Adam would move ten learning rates.
    assert float(run.layer.lora_B[:, R:].detach().abs().median()) >= 5e-3


@pytest.mark.parametrize(("kind", "change"), PAIRS)
def test_a_change_before_the_first_step_needs_no_moments(kind, change):
    run = Run(ADAMS[kind], lr=1e-3)
    CHANGES[change](run, None)
    run.step(2)
    for weight, moment in zip(
        (run.layer.lora_A, run.layer.lora_B), run.moments("exp_avg"), strict=True
    ):
        assert moment.shape == weight.shape


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 1])
def test_of_two_groups_the_one_without_momentum_needs_none(index, change):
    def uneven(parameters, lr):
        groups = [{"params": [p], "momentum": 0.0} for p in parameters]
        groups[index]["momentum"] = 0.9
        return SGD(groups, lr=lr)

    run = Run(uneven)
    run.step(STEPS)
    CHANGES[change](run, TOKENS)
    weight = (run.layer.lora_A, run.layer.lora_B)[index]
    expected = first_moments_in_the_new_basis(run, summed)[index]
    moment = run.optimizer.state[weight]["momentum_buffer"]
    torch.testing.assert_close(moment, expected, rtol=1e-9, atol=1e-12)
    run.step()


@pytest.mark.parametrize(("kind", "change"), PAIRS)
def test_a_weight_that_alone_has_moments_keeps_them(kind, change):
    run = Run(ADAMS[kind])
    run.step(STEPS)
    del run.optimizer.state[run.layer.lora_A]
    CHANGES[change](run, TOKENS)
    expected = first_moments_in_the_new_basis(run, lambda seen: averaged(seen, BETA1))[1]
    moment = run.optimizer.state[run.layer.lora_B]["exp_avg"]
    torch.testing.assert_close(moment, expected * cut(change, BETA1), rtol=1e-9, atol=1e-12)
    run.step()
