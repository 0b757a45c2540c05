"""The count of gradient directions, against the participation ratio of its definition."""

import pytest
import torch

from dynlora.importance.consecutive import ConsecutiveGradients
from dynlora.importance.directions import GradientDirections
from dynlora.types import BasisChange
from tests.lora_layers import layers_of, lora_chain, set_gradients

OUT, RANK = 24, 4


class Counted:
    """The count beside the gradients that it compares."""

    def __init__(self):
        self.gradients, self.directions = ConsecutiveGradients(), GradientDirections()
        self.layers = []

    def observe(self, layers):
        self.layers = layers
        self.directions.observe(self.gradients.observe(layers))

    @property
    def counts(self):
        return self.directions.counts(self.layers)


@pytest.fixture
def layer():
    return layers_of(lora_chain(12, OUT, r=RANK))[0]


def show_steps(counted, layer, strengths, *, steps=2000, scales=(1.0,)):
    """Show independent gradients with a power of `strengths` along the output's axes."""
    generator = torch.Generator().manual_seed(0)
    shown = []
    for step in range(steps):
        noise = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
        layer.lora_B.grad = scales[step % len(scales)] * torch.tensor(strengths)[:, None] * noise
        counted.observe([layer])
        shown.append(layer.lora_B.grad)
    return shown


def participation_ratio(gradients):
    """Return ``(Σ λ)² / Σ λ²`` of the eigenvalues of the mean of normed ``G Gᵀ``."""
    mean = sum(g @ g.T / g.norm() ** 2 for g in gradients)
    spectrum = torch.linalg.eigvalsh(mean)
    return float(spectrum.sum() ** 2 / spectrum.square().sum())


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_directions_of_equal_power_are_counted(layer, count):
    counted = Counted()
    show_steps(counted, layer, [1.0] * count + [0.0] * (OUT - count))
    assert counted.counts[layer.name] == pytest.approx(count, rel=0.05)


def test_it_is_the_participation_ratio_of_what_gradients_point_to(layer):
    counted = Counted()
    shown = show_steps(counted, layer, [0.8**index for index in range(OUT)])
    expected = participation_ratio(shown)
    assert 2 < expected < 6
    assert counted.counts[layer.name] == pytest.approx(expected, rel=0.05)


def test_a_few_large_gradients_do_not_decide(layer):
    counted = Counted()
    show_steps(counted, layer, [1.0] * 6 + [0.0] * 18, scales=(1e3, 1e-3))
    assert counted.counts[layer.name] == pytest.approx(6, rel=0.05)


def test_nothing_is_known_before_two_gradients_were_compared(layer):
    counted = Counted()
    assert counted.counts == {}
    set_gradients([layer], seed=0)
    counted.observe([layer])
    assert counted.counts == {}
    layer.lora_B.grad.zero_()
    counted.observe([layer])  # points nowhere
    assert counted.counts == {}


def test_a_change_of_rank_keeps_what_was_counted_and_compares_with_nothing_once(layer):
    counted = Counted()
    for seed in range(4):
        set_gradients([layer], seed=seed)
        counted.observe([layer])
    before = counted.counts
    eye = torch.eye(RANK, dtype=torch.float64)
    counted.gradients.rebase(BasisChange(name=layer.name, to_A=eye, to_B=eye))
    set_gradients([layer], seed=4)
    counted.observe([layer])
    assert counted.counts == before
    set_gradients([layer], seed=5)
    counted.observe([layer])
    assert counted.counts != before


@pytest.mark.parametrize("rank", [1, 5])
def test_a_restored_count_continues_as_the_saved_one_whatever_the_layout_of_gradients(rank):
    # As an engine or a fused backward pass leaves them: the transpose of a contiguous tensor.
    layer = layers_of(lora_chain(300, 301, r=rank))[0]
    saved, restored = Counted(), Counted()

    def show(seed, *counted):
        generator = torch.Generator().manual_seed(seed)
        shape = layer.lora_B.shape[::-1]
        layer.lora_B.grad = torch.randn(shape, generator=generator, dtype=layer.lora_B.dtype).T
        for one in counted:
            one.observe([layer])

    for seed in range(4):
        show(seed, saved)
    for mine, theirs in (
        (saved.gradients, restored.gradients),
        (saved.directions, restored.directions),
    ):
        state = {k: torch.tensor(v.tolist(), dtype=v.dtype) for k, v in mine.state_dict().items()}
        theirs.load_state_dict(state)
    restored.layers = [layer]
    assert restored.counts == saved.counts
    for seed in range(4, 8):
        show(seed, saved, restored)
    assert restored.counts == saved.counts


def test_gradients_that_take_turns_count_at_most_the_dimensions_of_the_output(layer):
    counted = Counted()
    for step in range(40):
        gradient = torch.zeros(OUT, RANK, dtype=torch.float64)
        gradient[step % 2] = 1.0
        layer.lora_B.grad = gradient
        counted.observe([layer])
    assert counted.counts == {layer.name: OUT}
