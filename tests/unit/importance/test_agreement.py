"""Consecutive gradients: their products, whether they agree by chance, and their directions."""

import itertools
import math

import pytest
import torch

from dynlora.history import SIGNIFICANT
from dynlora.importance.agreement import AgreementTest, GradientDirections
from dynlora.importance.consecutive import Comparison, ConsecutiveGradients
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, set_gradients

RANKS = [1, 2, 3, 4, 4, 5, 6, 8, 8, 9, 3, 16]
OUT, RANK = 24, 4


def eye_change(layer):
    eye = torch.eye(layer.r, dtype=torch.float64)
    return BasisChange(name=layer.name, to_A=eye, to_B=eye)


def layers_of_ranks():
    """Return layers of two heights in turn."""
    widths = [18 + 2 * (place % 2) for place in range(len(RANKS) + 1)]
    pattern = {str(place): rank for place, rank in enumerate(RANKS)}
    return layers_of(lora_chain(*widths, r=2, rank_pattern=pattern))


@pytest.mark.parametrize("broken", [(), ((1, 3), (0, 6))])
def test_layers_of_any_ranks_are_compared_with_their_last_gradient_as_each_by_itself(broken):
    layers = layers_of_ranks()
    together, alone = ConsecutiveGradients(), {x.name: ConsecutiveGradients() for x in layers}
    reached = [layers, layers, layers[:5], layers[3:], layers]
    for step, shown in enumerate(reached):
        set_gradients(layers, seed=step)
        for place in (place for when, place in broken if when == step):
            layers[place].lora_B.grad[0, 0] = torch.nan
        found = together.observe(shown)
        expected = {x.name: alone[x.name].observe([x]) for x in shown}
        assert sorted(found.names) == sorted(expected)
        for key in ("inner", "overlaps", "lengths"):
            each = torch.cat([getattr(expected[name], key) for name in found.names])
            ours = getattr(found, key)
            torch.testing.assert_close(ours, each, equal_nan=True, rtol=1e-12, atol=1e-12)
    kept = together.state_dict()
    assert all(torch.equal(kept[layer.name], layer.lora_B.grad) for layer in layers)


def test_layers_whose_basis_changed_alone_are_left_out_of_a_comparison():
    layers, gradients = layers_of_ranks(), ConsecutiveGradients()
    for step in range(4):
        set_gradients(layers, seed=step)
        found = gradients.observe(layers)
        unknown = {n for n, x in zip(found.names, found.lengths, strict=True) if x.isnan()}
        assert unknown == ({x.name for x in layers} if step == 0 else {layers[4].name})
        gradients.rebase(eye_change(layers[4]))


def test_gradients_are_compared_across_a_change_of_precision():
    model = lora_chain(12, 12, 12, dtype=torch.float32)
    gradients = ConsecutiveGradients()
    for dtype in (torch.float32, torch.float64, torch.float64, torch.bfloat16):
        model.to(dtype)
        layers = layers_of(model)
        set_gradients(layers, seed=0)
        found = gradients.observe(layers)
        gradients.load_state_dict(gradients.state_dict())  # as a run does that is resumed
    torch.testing.assert_close(found.inner, found.lengths, rtol=1e-2, atol=0)


class Compared:
    """Both statistics beside the gradients that they compare."""

    def __init__(self):
        self.parts = ConsecutiveGradients(), AgreementTest(), GradientDirections()
        self.gradients, self.test, self.directions = self.parts
        self.layers = []

    def observe(self, layers):
        self.layers = layers
        compared = self.gradients.observe(layers)
        self.test.observe(compared)
        self.directions.observe(compared)

    @property
    def z(self):
        return self.test.z

    @property
    def counts(self):
        return self.directions.counts(self.layers)

    def restored(self):
        """Return a copy from the states, with the tensors' memory laid out anew."""
        copied = Compared()
        for mine, its in zip(self.parts, copied.parts, strict=True):
            state = mine.state_dict().items()
            its.load_state_dict({k: torch.tensor(v.tolist(), dtype=v.dtype) for k, v in state})
        copied.layers = self.layers
        return copied


def show(compared, layers, *, sizes=(1.0,)):
    """Show steps whose gradients all point in one direction."""
    for size in sizes:
        for layer in layers:
            for weight in (layer.lora_A, layer.lora_B):
                weight.grad = torch.full_like(weight, size)
        compared.observe(layers)


@pytest.fixture
def layers():
    return layers_of(lora_chain(12, 8, 6))


def test_when_all_gradients_agree_z_is_the_root_of_the_comparisons(layers):
    compared = Compared()
    show(compared, layers)
    for count in range(1, 17):
        show(compared, layers)
        assert compared.z == pytest.approx(math.sqrt(count))
        assert compared.test.is_significant() == (math.sqrt(count) >= SIGNIFICANT)


def test_a_few_large_gradients_do_not_decide_and_zero_or_opposite_ones_do_not_agree(layers):
    compared = Compared()
    show(compared, layers, sizes=[1.0, *[1e6, 1e-6, 1e-6, 1e-6] * 4])
    assert compared.z == pytest.approx(4, rel=1e-5)
    compared = Compared()
    show(compared, layers, sizes=[1.0, 0.0])
    assert compared.z == 0
    show(compared, layers, sizes=[1.0, -1.0] * 20)
    assert compared.z < -6
    assert not compared.test.is_significant()


@pytest.mark.parametrize("size", [1e-5, 3e2])
def test_half_precision_gradients_neither_vanish_nor_overflow(size):
    layers, compared = layers_of(lora_chain(200, 200, dtype=torch.float16)), Compared()
    show(compared, layers, sizes=[size] * 5)
    assert compared.z == pytest.approx(2)


def test_it_is_the_mean_over_layers_of_the_cosine_of_consecutive_gradients_of_lora_B(layers):
    compared, gradients = Compared(), []
    for seed in range(8):
        set_gradients(layers, seed=seed)
        compared.observe(layers)
        gradients.append([layer.lora_B.grad.flatten().clone() for layer in layers])
    cosines = []
    for last, now in itertools.pairwise(gradients):
        pairs = zip(last, now, strict=True)
        each = [float(torch.dot(a, b) / (a.norm() * b.norm())) for a, b in pairs]
        cosines.append(sum(each) / len(each))
    expected = sum(cosines) / math.sqrt(sum(cosine**2 for cosine in cosines))
    assert compared.z == pytest.approx(expected, rel=1e-6)


def test_pure_chance_is_seldom_significant():
    generator = torch.Generator().manual_seed(0)
    significant = 0
    for _ in range(200):
        test = AgreementTest()
        gradients = torch.randn(31, 10, generator=generator, dtype=torch.float64)
        inner = (gradients[1:] * gradients[:-1]).sum(dim=1)
        lengths = gradients[1:].norm(dim=1) * gradients[:-1].norm(dim=1)
        for pair in zip(inner, lengths, strict=True):
            one, length = (value[None] for value in pair)
            test.observe(Comparison(names=["0"], inner=one, overlaps=one, lengths=length))
        significant += test.is_significant()
    assert significant <= 6  # 0.6 % of 200 is 1.2


def test_a_change_of_rank_keeps_both_and_leaves_out_the_next_comparison_only(layers):
    compared = Compared()
    show(compared, layers, sizes=[1.0] * 4)
    before = compared.z, compared.counts
    for layer in layers:
        compared.gradients.rebase(eye_change(layer))
    show(compared, layers)  # nothing to compare with
    assert (compared.z, compared.counts) == before
    set_gradients(layers, seed=5)
    compared.observe(layers)
    assert compared.z != before[0]
    assert compared.counts != before[1]


@pytest.mark.parametrize(("factor", "value"), [("B", "inf"), ("B", "nan"), ("A", "nan")])
@pytest.mark.parametrize("at", [0, 3])
def test_a_gradient_that_is_not_finite_is_compared_with_nothing_after_a_resume_too(
    layers, factor, value, at
):
    compared, without = Compared(), Compared()
    for seed in range(6):
        set_gradients(layers, seed=seed)
        if seed == at:
            for layer in layers:
                getattr(layer, f"lora_{factor}").grad[0, 0] = float(value)
        else:
            without.observe(layers)
        compared.observe(layers)
        if seed == at:
            compared = compared.restored()
    assert compared.z == without.z != 0
    assert compared.counts == without.counts


@pytest.fixture
def layer():
    return layers_of(lora_chain(12, OUT, r=RANK))[0]


def show_steps(compared, layer, strengths):
    """Show gradients of two sizes in turn, with `strengths` along the output's axes."""
    generator = torch.Generator().manual_seed(0)
    shown = []
    for step in range(600):
        noise = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
        layer.lora_B.grad = (1e3, 1e-3)[step % 2] * torch.tensor(strengths)[:, None] * noise
        compared.observe([layer])
        shown.append(layer.lora_B.grad)
    return shown


def participation_ratio(gradients):
    """Return ``(Σ λ)² / Σ λ²`` of the eigenvalues of the mean of normed ``G Gᵀ``."""
    mean = sum(g @ g.T / g.norm() ** 2 for g in gradients)
    spectrum = torch.linalg.eigvalsh(mean)
    return float(spectrum.sum() ** 2 / spectrum.square().sum())


def test_the_count_is_the_participation_ratio_of_what_gradients_point_to(layer):
    compared = Compared()
    shown = show_steps(compared, layer, [0.8**index for index in range(OUT)])
    expected = participation_ratio(shown)
    assert 2 < expected < 6
    assert compared.counts[layer.name] == pytest.approx(expected, rel=0.05)


def test_no_directions_are_known_before_two_gradients_were_compared(layer):
    compared = Compared()
    assert compared.counts == {}
    show(compared, [layer], sizes=[1.0, 0.0])  # the second points nowhere
    assert compared.counts == {}


@pytest.mark.parametrize("rank", [1, 5])
def test_a_restored_count_continues_as_the_saved_one_whatever_the_layout_of_gradients(rank):
    # As an engine or a fused backward pass leaves them: the transpose of a contiguous tensor.
    layer = layers_of(lora_chain(300, 301, r=rank))[0]
    generator = torch.Generator().manual_seed(0)
    saved = restored = Compared()
    for seed in range(8):
        shape = layer.lora_B.shape[::-1]
        layer.lora_B.grad = torch.randn(shape, generator=generator, dtype=layer.lora_B.dtype).T
        saved.observe([layer])
        if seed > 3:
            restored.observe([layer])
        elif seed == 3:
            restored = saved.restored()
        assert restored.counts == saved.counts


def test_gradients_that_take_turns_count_at_most_the_dimensions_of_the_output(layer):
    compared = Compared()
    for step in range(40):
        gradient = torch.zeros(OUT, RANK, dtype=torch.float64)
        gradient[step % 2] = 1.0
        layer.lora_B.grad = gradient
        compared.observe([layer])
    assert compared.counts == {layer.name: OUT}
