"""When a run stops early, decided from its log."""

import pytest

from dynlora.train.early_stopping import EarlyStopping


def log(metric: str, *values: float) -> list[dict[str, float]]:
    """Return a log with training lines between the evaluations."""
    return [line for value in values for line in ({"loss": 1.0}, {f"eval_{metric}": value})]


@pytest.mark.parametrize(
    ("values", "over"),
    [
        ((), False),
        ((0.5,), False),
        ((0.5, 0.4), False),
        ((0.5, 0.4, 0.45), True),
        ((0.5, 0.4, 0.6, 0.5), False),
        ((0.5, 0.5, 0.5), True),  # as good is not better
    ],
)
def test_it_is_over_after_two_evaluations_with_nothing_better(
    values: tuple[float, ...], over: bool
) -> None:
    assert EarlyStopping("accuracy", 2).is_over(log("accuracy", *values)) is over
    lower = tuple(1 - value for value in values)
    assert EarlyStopping("loss", 2).is_over(log("loss", *lower)) is over


def test_other_metrics_do_not_matter() -> None:
    assert not EarlyStopping("accuracy", 1).is_over(log("f1", 0.5, 0.4, 0.3))
