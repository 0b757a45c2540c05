"""Comparisons: statistics with known answers, pairs by seed, directions, corrections, verdicts."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.report.comparison import (
    PairedComparison,
    Quantity,
    Verdict,
    compare,
    standings,
)
from benchmarks.harness.report.results import Cell, StudyResults, group, read_result
from benchmarks.harness.report.statistics import bootstrap_interval, holm, least_p, sign_flip_p
from tests.harness.records import values

SKEWED = [0.01, 0.02, -0.01, 0.05, 0.2, 0.03, 0.04, -0.02, 0.015, 0.6]


def normal(count: int, mean: float = 0.0, seed: int = 0) -> list[float]:
    return list(np.random.default_rng(seed).normal(mean, 1.0, count))


def test_intervals_of_ten_pairs_have_the_documented_coverage():
    intervals = [bootstrap_interval(normal(10, 3.0, seed)) for seed in range(150)]
    covered = sum(low <= 3.0 <= high for low, high in intervals)
    assert covered / 1.5 == pytest.approx(90, abs=6)  # the standard error is 2.4 percent


def test_the_interval_of_skewed_values_reaches_further_up_and_follows_the_values():
    percentile = stats.bootstrap(
        (SKEWED,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = bootstrap_interval(SKEWED)
    assert high > percentile.high + 0.05
    assert low > percentile.low
    moved = bootstrap_interval([2 * value + 1 for value in SKEWED])
    assert moved == pytest.approx((2 * low + 1, 2 * high + 1))


def test_equal_differences_have_an_interval_without_width():
    for value in (0.0, 0.1, -3.0):
        assert bootstrap_interval([value] * 3) == pytest.approx((value, value))
    assert bootstrap_interval([0.1 + 0.2, 0.3]) == pytest.approx((0.3, 0.3))
    assert bootstrap_interval([1.0, 3.0]) == pytest.approx((1.0, 3.0))


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([1.0, 2.0], 0.5),  # of 3, 1, -1, -3 two
        ([1.0, 2.0, -3.0], 1.0),  # the sum is 0
        ([1.0, 1.0, 1.0, -1.0], 0.625),  # 2 + 2 * 4 of 16 patterns have a sum of 2 or more
        ([0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, -0.3 - 1e-17], 1.0),  # 0 but for rounding
        ([0.1] * 9 + [-0.1] * 3, stats.binomtest(3, 12).pvalue),
    ],
)
def test_the_p_value_is_that_counted_by_hand(values, p):
    assert sign_flip_p(values) == pytest.approx(p, abs=1e-12)


def test_more_than_sixteen_pairs_give_a_sampled_p_value_near_the_exact_one():
    values = normal(20, 0.45)
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=10)))
    halves = signs @ np.array(values[:10]), signs @ np.array(values[10:])
    sums = np.abs(halves[0][:, None] + halves[1][None, :])
    exact = (sums >= abs(sum(values)) - 1e-9).mean()
    first = sign_flip_p(values)
    assert first == pytest.approx(exact, abs=0.004)
    assert sign_flip_p(values) == first
    for pairs in (2, 16, 17):
        one_way = [1.0 + 0.01 * n for n in range(pairs)]
        assert sign_flip_p(one_way) == pytest.approx(least_p(pairs))


def test_holms_correction_is_that_of_r():
    corrected = [0.05, 0.08, 0.09, 0.09, 0.09]  # p.adjust(p, "holm")
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx(corrected)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert (holm([0.6, 0.7]), holm([])) == ([1.0, 1.0], [])


def study_of(runs: Iterable[dict]) -> StudyResults:
    (study,) = group([read_result(Path(f"first/{n}.json"), run) for n, run in enumerate(runs)])
    return study


def losses(method: str, by_seed: dict[int, float | None], **changes: object) -> list[dict]:
    return [
        values(method=method, seed=seed, **changes)
        | {"validation": {"loss": loss, "accuracy": 0.5}}
        for seed, loss in by_seed.items()
    ]


def shifted(by: float, seeds: int = 8) -> list[dict]:
    base = {seed: 1.0 + 0.01 * seed for seed in range(seeds)}
    moved = {seed: loss + by + 0.001 * (seed % 3) for seed, loss in base.items()}
    return losses("lora", base) + losses("a", moved)


def compared(runs: Iterable[dict], quantity: Quantity = Quantity.LOSS) -> PairedComparison:
    """Return the only comparison of a quantity."""
    (one,) = [c for c in compare(study_of(runs), "lora") if c.quantity is quantity]
    return one


def test_runs_are_paired_by_seed_within_a_budget():
    runs = losses("lora", {0: 1.0, 1: 2.0, 3: 9.0}) + losses("a", {1: 2.5, 0: 1.25, 2: 7.0})
    found = compared(runs)
    assert (found.differences, found.mean, found.lost) == ({0: 0.25, 1: 0.5}, 0.375, 0)
    apart = losses("lora", {0: 1.0, 1: 1.0}, budget=2) + losses("a", {0: 1.0, 1: 1.0}, budget=8)
    assert compare(study_of(apart), "lora") == []


def test_a_lost_pair_is_counted_and_leaves_the_verdict_open():
    failed = [values(method="a", seed=seed, status="failed") for seed in (8, 9)]
    found = compared([*shifted(-0.1), *losses("lora", {8: 1.0, 9: 1.0}), *failed])
    assert (found.lost, len(found.differences), found.corrected) == (2, 8, 2 / 2**8)
    assert found.verdict is Verdict.OPEN
    infinite = losses("lora", {0: 1.0, 1: 2.0, 2: None}) + losses("a", {0: 1.5, 1: None, 2: 3.0})
    assert (compared(infinite).differences, compared(infinite).lost) == ({0: 0.5}, 2)
    # The accuracy of such a run means nothing either.
    assert compared(infinite, Quantity.METRIC).differences == {0: 0.0}


def test_few_pairs_have_no_interval_and_one_pair_has_no_p_value():
    assert compared(shifted(-0.1, seeds=5)).interval is None
    assert compared(shifted(-0.1, seeds=6)).interval
    found = compared(losses("lora", {0: 1.0}) + losses("a", {0: 0.5}))
    assert (found.mean, found.interval, found.p, found.corrected) == (-0.5, None, None, None)
    assert (found.verdict, found.interval_says) == (Verdict.OPEN, Verdict.OPEN)
    never = compared(losses("lora", {0: 1.0, 1: 2.0}) + losses("a", {0: None, 1: None}))
    assert (never.differences, never.lost, never.interval, never.p) == ({}, 2, None, None)


@pytest.mark.parametrize(
    ("by", "verdict"), [(-0.1, Verdict.BETTER), (0.1, Verdict.WORSE), (-0.001, Verdict.OPEN)]
)
def test_a_lower_loss_is_better(by, verdict):
    found = compared(shifted(by))
    assert found.verdict is verdict
    assert found.interval_says is verdict
    if verdict is not Verdict.OPEN:
        # Eight differences of one sign: the smallest of 256 patterns, from both sides.
        assert found.p == 2 / 2**8


def scored(metric: str = "accuracy", **by_method: dict) -> list[dict]:
    """Return runs of eight seeds with equal validation losses."""
    return [
        values(method=method, seed=seed, main_metric=metric)
        | {key: value | {metric: value[metric] + 0.001 * seed} for key, value in splits.items()}
        for method, splits in by_method.items()
        for seed in range(8)
    ]


@pytest.mark.parametrize(("metric", "verdict"), [("f1", Verdict.BETTER), ("rmse", Verdict.WORSE)])
def test_a_higher_metric_is_better_unless_it_is_an_error(metric, verdict):
    runs = scored(metric, lora={"validation": {"loss": 1.0, metric: 0.5}},
                  a={"validation": {"loss": 1.0, metric: 0.6}})  # fmt: skip
    found = compared(runs, Quantity.METRIC)
    assert found.gain == pytest.approx(0.1 if verdict is Verdict.BETTER else -0.1)
    assert (found.metric, found.verdict) == (metric, verdict)


def test_test_rows_are_compared_where_both_have_them_and_a_loss_once():
    runs = scored(lora={"test": {"loss": 1.0, "accuracy": 0.6}},
                  a={"test": {"loss": 1.5, "accuracy": 0.65}})  # fmt: skip
    runs[0]["test"] = None
    found = compared(runs, Quantity.TEST_LOSS)
    assert (found.mean, found.gain) == pytest.approx((0.5, -0.5))
    assert list(found.differences) == list(range(1, 8))
    assert compared(runs, Quantity.TEST).mean == pytest.approx(0.05)
    same = [run | {"main_metric": "loss", "test": None} for run in runs]
    assert [found.quantity for found in compare(study_of(same), "lora")] == [Quantity.LOSS]


def test_p_values_are_corrected_over_the_comparisons_of_a_quantity():
    runs = shifted(-0.1)
    for number in range(9):
        runs += losses(f"b{number}", {seed: 1.0 + (-1) ** seed for seed in range(8)})
    found = [c for c in compare(study_of(runs), "lora") if c.quantity is Quantity.LOSS]
    assert found[0].p == 2 / 2**8
    assert found[0].corrected == pytest.approx(10 * 2 / 2**8)
    assert {c.corrected for c in found[1:]} == {1.0}
    assert (found[0].verdict, found[0].interval_says) == (Verdict.OPEN, Verdict.BETTER)


def comparison(
    task: str, differences: dict[int, float], corrected: float | None = 1.0, **changes: Any
) -> PairedComparison:
    given = {"method": "a", "metric": "accuracy", "lost": 0, "interval": (-1.0, 1.0)} | changes
    return PairedComparison(
        cell=Cell("m", task, 8), quantity=Quantity.METRIC, differences=differences, p=1.0,
        corrected=corrected, **given,
    )  # fmt: skip


SMALL = {seed: 0.1 + 0.01 * seed for seed in range(8)}


def test_over_all_cells_verdicts_are_counted_and_a_seed_counts_once_if_every_cell_has_it():
    above, below = {"interval": (0.5, 1.5)}, {"interval": (-2.0, -0.5)}
    found = standings(
        [
            comparison("t1", {0: 1.0}, 0.01, **above),
            comparison("t2", {0: -1.0}, 0.01, **below),
            comparison("t3", {0: 1.0}, 0.2, **above),
            comparison("t4", {0: 1.0}, None),
        ]
    )[0]
    assert found.verdicts == (Verdict.BETTER, Verdict.WORSE, Verdict.OPEN, Verdict.OPEN)
    assert found.intervals == (Verdict.BETTER, Verdict.WORSE, Verdict.BETTER, Verdict.OPEN)
    cells = [comparison("t1", {0: 0.2, 1: 0.4, 2: 9.0}), comparison("t2", {0: 0.6, 1: 0.0})]
    found = standings(cells)[0]
    assert found.means == pytest.approx((0.4, 0.2))
    assert (found.p, found.interval) == (0.5, None)
    cells = [comparison("t1", {0: 0.2, 1: 0.4}), comparison("t2", {0: 0.4, 1: 0.6}, metric="rmse")]
    assert standings(cells)[0].gain == pytest.approx((0.3 - 0.5) / 2)
    none = standings([comparison("t1", {0: 1.0}), comparison("t2", {1: 1.0})])[0]
    assert (none.means, none.interval, none.p, none.corrected) == ((), None, None, None)
    assert (none.gain, none.verdict) == (1.0, Verdict.OPEN)
    assert standings([comparison("t1", {}, None)])[0].gain is None


def test_over_all_cells_the_correction_is_over_methods_and_a_lost_pair_shows_nothing():
    found = standings([comparison(f"t{n}", SMALL) for n in range(20)])[0]
    assert set(found.verdicts) == {Verdict.OPEN}
    assert (found.corrected, found.verdict) == (2 / 2**8, Verdict.BETTER)
    four = standings([comparison("t", SMALL, method=method) for method in "abcd"])
    assert [one.corrected for one in four] == [pytest.approx(4 * 2 / 2**8)] * 4
    assert standings([comparison("t1", SMALL, lost=1)])[0].verdict is Verdict.OPEN
