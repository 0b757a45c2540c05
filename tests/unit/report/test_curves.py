"""Curves of what was logged, and the scales under them."""

from statistics import fmean

import pytest

from dynlora.report.axes import Scale, label, round_steps
from dynlora.report.curves import MOST_POINTS, charts, series, thin
from dynlora.report.markup import to_html
from tests.unit.report.runs import METRICS


def test_a_curve_has_the_finite_values_with_their_steps() -> None:
    assert series(METRICS, "loss") == [(10, 0.7), (30, 0.6)]
    assert series(METRICS, "eval_pearson") == [(0, 0.125), (100, 0.625)]
    assert series([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "x"}], "loss") == []
    assert series([{"step": 1, "loss": 1e301}, {"step": 2, "loss": -1e308}], "loss") == []


def test_there_is_a_chart_for_the_loss_and_for_each_metric_that_was_logged() -> None:
    drawn = charts(METRICS, ["pearson", "loss", "never_logged"], at=[50], steps=100)
    titles = [chart[0][0].text for chart in drawn]
    assert titles == ["loss over the optimizer steps", "pearson over the optimizer steps"]
    assert charts([], ["pearson"], at=[], steps=0) == []


def test_points_lie_where_their_values_are() -> None:
    chart = charts(METRICS, ["pearson"], at=[], steps=100)[1]
    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in chart.iter("circle")]
    (first, low), (last, high) = circles
    assert first < last
    assert low > high, "a larger value is higher up"
    assert "training" not in to_html(chart)


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], [1e-9, 2e-9], [3e5, 4e9], [-1.0, 1.0], [1e20], [-1e300, 1e300]]
)
def test_any_values_can_be_drawn(values: list[float]) -> None:
    metrics = [{"step": n, "eval_m": value} for n, value in enumerate(values)]
    (chart,) = charts(metrics, ["m"], at=[], steps=len(values))
    for circle in chart.iter("circle"):
        assert 39 <= float(circle.get("cy", "")) <= 197


def test_many_points_become_means_of_stretches() -> None:
    points = [(n, float(n % 7)) for n in range(1234)]
    thinned = thin(points)
    assert len(thinned) <= MOST_POINTS
    assert thinned[0] == (2, fmean([0, 1, 2]))
    assert thinned[-1][0] == 1233
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    ("low", "high", "most", "marks"),
    [
        (0, 1, 4, [0, 0.5, 1]),
        (0, 245, 5, [0, 50, 100, 150, 200]),
        (0.69, 0.71, 4, [0.69, 0.695, 0.7, 0.705, 0.71]),
        (0, 1, 1, [0, 1]),
        (-3, 5, 4, [-2, 0, 2, 4]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, most: int, marks: list[float]) -> None:
    assert round_steps(low, high, most) == pytest.approx(marks)


def test_labels_hide_floating_points_noise() -> None:
    assert [label(v) for v in (0.1 + 0.2, 20000.0, -0.5)] == ["0.3", "20,000", "-0.5"]


def test_a_scale_maps_its_ends_onto_its_pixels() -> None:
    scale = Scale(10, 20, 100, 0)
    assert [scale(value) for value in (10, 15, 20)] == [100, 50, 0]
