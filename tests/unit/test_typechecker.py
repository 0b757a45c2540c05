"""The tests' own type checker: without it, wrong types and shapes would go unnoticed."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from dynlora.importance.attention_entropy import focus
from dynlora.schedule import is_sampled


def test_a_value_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="step='100'"):
        is_sampled((10,), "100")  # type: ignore[arg-type]


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="visible"):
        focus(torch.zeros(1, 2, 3), torch.ones(1, 2, 4, dtype=torch.bool))
