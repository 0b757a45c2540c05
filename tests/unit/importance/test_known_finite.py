"""Who is asked whether gradients are finite."""

import pytest
import torch

from dynlora.importance.known_finite import are_known_finite


@pytest.mark.parametrize("given", [[True, True], [True, False], [False, False]])
def test_a_cpu_is_asked(given):
    assert are_known_finite(torch.tensor(given)) == all(given)


def test_another_device_is_not_asked():
    assert not are_known_finite(torch.ones(2, dtype=torch.bool, device="meta"))  # has no values
