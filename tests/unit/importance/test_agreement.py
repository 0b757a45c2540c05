"""The agreement test: do consecutive gradients agree more than by chance?"""

import itertools
import math

import pytest
import torch

from dynlora.importance.agreement import SIGNIFICANT, AgreementTest
from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, set_gradients


class Compared:
    """The test beside the gradients that it compares."""

    def __init__(self):
        self.gradients, self.test = ConsecutiveGradients(), AgreementTest()
        self.is_significant, self.rebase = self.test.is_significant, self.gradients.rebase

    def observe(self, layers):
        self.test.observe(self.gradients.observe(layers))

    @property
    def z(self):
        return self.test.z

    def state_dict(self):
        return {"gradients": self.gradients.state_dict(), "test": self.test.state_dict()}

    def load_state_dict(self, state):
        self.gradients.load_state_dict(state["gradients"])
        self.test.load_state_dict(state["test"])


def show(test, layers, *, sign=1.0, size=1.0):
    """Show one step whose gradients all point along `sign`."""
    for layer in layers:
        for weight in (layer.lora_A, layer.lora_B):
            weight.grad = torch.full_like(weight, sign * size)
    test.observe(layers)


@pytest.fixture
def layers():
    return layers_of(lora_chain(12, 8, 6))


@pytest.mark.parametrize("count", [1, 4, 9, 16])
def test_when_all_gradients_agree_z_is_the_root_of_the_comparisons(layers, count):
    test = Compared()
    for _ in range(count + 1):
        show(test, layers)
    assert test.z == pytest.approx(math.sqrt(count))


def test_steady_agreement_becomes_significant_at_the_stated_threshold(layers):
    test = Compared()
    show(test, layers)
    for count in range(1, 12):
        show(test, layers)
        assert test.is_significant() == (math.sqrt(count) >= SIGNIFICANT)


def test_a_few_large_gradients_do_not_decide(layers):
    test = Compared()
    show(test, layers)
    for index in range(16):
        show(test, layers, size=1e6 if index % 4 == 0 else 1e-6)
    assert test.z == pytest.approx(4, rel=1e-5)


def test_a_zero_gradient_agrees_with_nothing(layers):
    test = Compared()
    show(test, layers)
    show(test, layers, size=0.0)
    assert test.z == 0


@pytest.mark.parametrize("size", [1e-5, 3e2])
def test_half_precision_gradients_neither_vanish_nor_overflow(size):
    layers = layers_of(lora_chain(200, 200, dtype=torch.float16))
    test = Compared()
    for _ in range(5):
        show(test, layers, size=size)
    assert test.z == pytest.approx(2)


def test_it_is_the_mean_over_layers_of_the_cosine_of_consecutive_gradients_of_lora_B(layers):
    test, gradients = Compared(), []
    for seed in range(8):
        set_gradients(layers, seed=seed)
        test.observe(layers)
        gradients.append([layer.lora_B.grad.flatten().clone() for layer in layers])
    cosines = []
    for last, now in itertools.pairwise(gradients):
        pairs = zip(last, now, strict=True)
        each = [float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in pairs]
        cosines.append(sum(each) / len(each))
    expected = sum(cosines) / math.sqrt(sum(cosine**2 for cosine in cosines))
    assert test.z == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_is_compared_with_nothing(layers, first):
    test, without = Compared(), Compared()
    for seed in range(6):
        set_gradients(layers, seed=seed)
        if seed == (0 if first else 3):
            layers[0].lora_B.grad[0, 0] = float("inf")
            layers[1].lora_A.grad[0, 0] = float("nan")
        else:
            without.observe(layers)
        test.observe(layers)
    assert test.z == without.z != 0


def test_pure_chance_is_seldom_significant():
    layers = layers_of(lora_chain(6, 5, r=2))
    generator = torch.Generator().manual_seed(0)
    significant = 0
    for _ in range(200):
        test = Compared()
        for _ in range(30):
            for layer in layers:
                shape = layer.lora_B.shape
                layer.lora_B.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            test.observe(layers)
        significant += test.is_significant()
    assert significant <= 6  # 0.6 % of 200 is 1.2


def test_a_resized_layer_is_left_out_of_the_next_comparison_only(layers):
    test = Compared()
    for _ in range(5):
        show(test, layers)
    eye = torch.eye(4, dtype=torch.float64)
    for layer in layers:
        test.rebase(BasisChange(name=layer.name, to_A=eye, to_B=eye))
    assert test.z == pytest.approx(2)
    show(test, layers)  # nothing to compare with
    assert test.z == pytest.approx(2)
    show(test, layers)
    assert test.z == pytest.approx(math.sqrt(5))


@pytest.mark.parametrize(("factor", "value"), [("B", "inf"), ("B", "nan"), ("A", "nan")])
def test_a_test_restored_after_a_gradient_that_is_not_finite_continues_as_the_saved_one(
    layers, factor, value
):
    saved, restored = Compared(), Compared()
    set_gradients(layers, seed=0)
    for layer in layers:
        getattr(layer, f"lora_{factor}").grad[0, 0] = float(value)
    saved.observe(layers)
    restored.load_state_dict(saved.state_dict())
    for seed in range(1, 5):
        set_gradients(layers, seed=seed)
        saved.observe(layers)
        restored.observe(layers)
    assert restored.z == saved.z != 0
