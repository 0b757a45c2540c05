"""Methods over all cells: counts of verdicts, gains turned one way, and one test by seed."""

import pytest

from benchmarks.harness.report.comparison import Comparison, Quantity, Verdict
from benchmarks.harness.report.overall import standings
from benchmarks.harness.report.record import Cell


def comparison(
    task: str, differences: dict[int, float], method: str = "a", metric: str = "accuracy",
    corrected: float | None = 1.0, interval: tuple[float, float] = (-1.0, 1.0),
    lost: int = 0,
) -> Comparison:  # fmt: skip
    return Comparison(
        cell=Cell("m", task, 8), method=method, quantity=Quantity.METRIC, metric=metric,
        differences=differences, lost=lost, interval=interval, p=1.0, corrected=corrected,
    )  # fmt: skip


def test_cells_are_counted_by_their_verdict():
    found = standings(
        [
            comparison("t1", {0: 1.0}, corrected=0.01, interval=(0.5, 1.5)),
            comparison("t2", {0: -1.0}, corrected=0.01, interval=(-2.0, -0.5)),
            comparison("t3", {0: 1.0}, corrected=0.2, interval=(0.5, 1.5)),
            comparison("t4", {0: 1.0}, corrected=None),
        ]
    )[0]
    assert found.verdicts == (Verdict.BETTER, Verdict.WORSE, Verdict.OPEN, Verdict.OPEN)
    assert found.intervals == (Verdict.BETTER, Verdict.WORSE, Verdict.BETTER, Verdict.OPEN)


def test_the_gain_is_the_mean_over_cells_with_errors_turned():
    cells = [comparison("t1", {0: 0.2, 1: 0.4}), comparison("t2", {0: 0.4, 1: 0.6}, metric="rmse")]
    assert standings(cells)[0].gain == pytest.approx((0.3 - 0.5) / 2)


def test_a_seed_counts_once_with_its_mean_over_cells():
    cells = [comparison("t1", {0: 0.2, 1: 0.4, 2: 9.0}), comparison("t2", {0: 0.6, 1: 0.0})]
    found = standings(cells)[0]
    assert found.means == pytest.approx((0.4, 0.2))
    assert found.p == 0.5  # two seeds of one sign
    assert found.interval is None


def test_the_gain_is_that_of_the_seeds_which_the_test_is_about():
    """A cell with a seed of its own that is far off must not turn the gain against its verdict."""
    small = {seed: 0.1 + 0.01 * seed for seed in range(7)}
    found = standings([comparison("t1", small | {7: -9.0}), comparison("t2", small)])[0]
    assert found.gain == pytest.approx(0.13)
    assert found.interval
    assert found.interval[0] <= found.gain <= found.interval[1]
    assert found.verdict is Verdict.BETTER


def test_where_a_pair_is_lost_nothing_is_shown_over_all_cells():
    gains = {seed: 0.1 + 0.01 * seed for seed in range(8)}
    assert standings([comparison("t1", gains, lost=1)])[0].verdict is Verdict.OPEN


def test_over_all_cells_few_seeds_can_show_what_no_cell_can():
    cells = [comparison(f"t{n}", {seed: 0.1 + 0.01 * seed for seed in range(8)}) for n in range(20)]
    found = standings(cells)[0]
    assert set(found.verdicts) == {Verdict.OPEN}
    assert (found.corrected, found.verdict) == (2 / 2**8, Verdict.BETTER)


def test_the_correction_is_over_the_methods():
    same = {seed: 0.1 + 0.01 * seed for seed in range(8)}
    found = standings([comparison("t", same, method=method) for method in "abcd"])
    assert [one.corrected for one in found] == [pytest.approx(4 * 2 / 2**8)] * 4


def test_without_a_seed_in_every_cell_nothing_is_tested():
    found = standings([comparison("t1", {0: 1.0}), comparison("t2", {1: 1.0})])[0]
    assert (found.means, found.interval, found.p, found.corrected) == ((), None, None, None)
    assert (found.gain, found.verdict) == (1.0, Verdict.OPEN)


def test_a_cell_without_a_pair_leaves_no_gain_but_its_verdict():
    found = standings([comparison("t1", {}, corrected=None)])[0]
    assert (found.gain, found.verdicts) == (None, (Verdict.OPEN,))
