"""Comparisons: pairs by seed, direction of each metric, what is left out, correction, verdicts."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.harness.report.comparison import Comparison, Quantity, Verdict, compare
from benchmarks.harness.report.record import as_record
from benchmarks.harness.report.study import Study, group
from tests.harness.report.records import values


def study_of(runs: Iterable[dict]) -> Study:
    records = [as_record(Path(f"first/{n}.json"), run) for n, run in enumerate(runs)]
    (study,) = group(records)
    return study


def losses(method: str, by_seed: dict[int, float | None], **changes: object) -> list[dict]:
    """Return a method's runs by seed; None is a loss that is no number."""
    return [
        {
            **values(method=method, seed=seed, **changes),
            "validation": {"loss": loss, "accuracy": 0.5},
        }
        for seed, loss in by_seed.items()
    ]


def only(found: list[Comparison], quantity: Quantity = Quantity.LOSS) -> Comparison:
    (one,) = [comparison for comparison in found if comparison.quantity is quantity]
    return one


def test_runs_are_paired_by_seed_and_a_seed_of_one_side_is_left_out():
    runs = losses("lora", {0: 1.0, 1: 2.0, 3: 9.0}) + losses("a", {1: 2.5, 0: 1.25, 2: 7.0})
    found = only(compare(study_of(runs), "lora"))
    assert found.differences == {0: 0.25, 1: 0.5}
    assert found.mean == 0.375
    assert found.lost == 0


def test_a_pair_of_which_one_run_failed_is_counted_as_lost():
    runs = losses("lora", {0: 1.0, 1: 2.0}) + losses("a", {0: 1.5})
    found = only(compare(study_of([*runs, values(method="a", seed=1, status="failed")]), "lora"))
    assert (found.differences, found.lost) == ({0: 0.5}, 1)


def test_a_method_of_which_runs_failed_is_not_called_better_for_the_others():
    failed = [values(method="a", seed=seed, status="failed") for seed in (8, 9)]
    runs = [*shifted(-0.1), *losses("lora", {8: 1.0, 9: 1.0}), *failed]
    found = only(compare(study_of(runs), "lora"))
    assert (found.lost, len(found.differences)) == (2, 8)
    assert found.corrected == 2 / 2**8
    assert found.verdict is Verdict.OPEN


def test_fewer_pairs_than_could_show_anything_have_no_interval():
    assert only(compare(study_of(shifted(-0.1, seeds=5)), "lora")).interval is None
    assert only(compare(study_of(shifted(-0.1, seeds=6)), "lora")).interval


def test_a_pair_with_a_loss_that_is_no_number_is_counted_and_not_averaged():
    runs = losses("lora", {0: 1.0, 1: 2.0, 2: None}) + losses("a", {0: 1.5, 1: None, 2: 3.0})
    found = compare(study_of(runs), "lora")
    assert only(found).differences == {0: 0.5}
    assert only(found).lost == 2
    # The accuracy of such a run means nothing either.
    assert only(found, Quantity.METRIC).differences == {0: 0.0}


def test_a_method_that_never_gives_a_number_is_still_there():
    runs = losses("lora", {0: 1.0, 1: 2.0}) + losses("a", {0: None, 1: None})
    (found,) = compare(study_of(runs), "lora")
    assert (found.differences, found.lost, found.interval, found.p) == ({}, 2, None, None)
    assert found.verdict is Verdict.OPEN


def test_one_pair_has_a_difference_but_no_interval_and_no_p_value():
    found = only(compare(study_of(losses("lora", {0: 1.0}) + losses("a", {0: 0.5})), "lora"))
    assert (found.mean, found.interval, found.p, found.corrected) == (-0.5, None, None, None)
    assert (found.verdict, found.interval_says) == (Verdict.OPEN, Verdict.OPEN)


def shifted(by: float, seeds: int = 8) -> list[dict]:
    base = {seed: 1.0 + 0.01 * seed for seed in range(seeds)}
    moved = {seed: loss + by + 0.001 * (seed % 3) for seed, loss in base.items()}
    return losses("lora", base) + losses("a", moved)


@pytest.mark.parametrize(
    ("by", "verdict"), [(-0.1, Verdict.BETTER), (0.1, Verdict.WORSE), (-0.001, Verdict.OPEN)]
)
def test_a_lower_loss_is_better(by, verdict):
    found = only(compare(study_of(shifted(by)), "lora"))
    assert found.verdict is verdict
    assert found.interval_says is verdict
    if verdict is not Verdict.OPEN:
        # Eight differences of one sign: the smallest of 256 patterns, from both sides.
        assert found.p == 2 / 2**8


@pytest.mark.parametrize(("metric", "verdict"), [("f1", Verdict.BETTER), ("rmse", Verdict.WORSE)])
def test_a_higher_metric_is_better_unless_it_is_an_error(metric, verdict):
    runs = [
        values(method=method, seed=seed, main_metric=metric,
               validation={"loss": 1.0, metric: 0.5 + gain + 0.001 * seed})
        for method, gain in (("lora", 0.0), ("a", 0.1))
        for seed in range(8)
    ]  # fmt: skip
    found = only(compare(study_of(runs), "lora"), Quantity.METRIC)
    assert found.mean == pytest.approx(0.1)
    assert found.gain == pytest.approx(0.1 if verdict is Verdict.BETTER else -0.1)
    assert found.verdict is verdict
    assert found.metric == metric


def test_a_main_metric_that_is_the_loss_is_compared_once():
    runs = [
        values(method=method, seed=seed, main_metric="loss", validation={"loss": 1.0})
        for method in ("lora", "a")
        for seed in range(2)
    ]
    assert [found.quantity for found in compare(study_of(runs), "lora")] == [Quantity.LOSS]


def test_the_test_metric_is_compared_where_both_have_one():
    runs = [
        values(method=method, seed=seed,
               test={"loss": 1.0, "accuracy": 0.9 if method == "a" else 0.5} if seed else None)
        for method in ("lora", "a")
        for seed in range(3)
    ]  # fmt: skip
    found = only(compare(study_of(runs), "lora"), Quantity.TEST)
    assert found.differences == pytest.approx({1: 0.4, 2: 0.4})


def test_a_lower_test_loss_is_better():
    """A method may gain in the rows it was tuned on and lose on others."""
    runs = [
        values(method=method, seed=seed, test={"loss": loss, "accuracy": 0.5})
        for method, loss in (("lora", 1.0), ("a", 1.5))
        for seed in range(8)
    ]
    found = only(compare(study_of(runs), "lora"), Quantity.TEST_LOSS)
    assert (found.mean, found.gain) == pytest.approx((0.5, -0.5))
    assert found.verdict is Verdict.WORSE


def test_methods_are_compared_within_a_budget_only():
    runs = losses("lora", {0: 1.0, 1: 1.0}, budget=2) + losses("a", {0: 1.0, 1: 1.0}, budget=8)
    assert compare(study_of(runs), "lora") == []


def test_p_values_are_corrected_over_the_comparisons_of_one_quantity():
    runs = shifted(-0.1)
    for method in ("b", "c"):
        runs += losses(method, {seed: 1.0 + (-1) ** seed for seed in range(8)})
    found = [c for c in compare(study_of(runs), "lora") if c.quantity is Quantity.LOSS]
    assert [c.method for c in found] == ["a", "b", "c"]
    # Three tests: the smallest p-value is tripled; the two others are as large as can be.
    assert found[0].corrected == pytest.approx(3 * 2 / 2**8)
    assert found[1].corrected == found[2].corrected == 1.0


def test_a_verdict_needs_the_corrected_p_value():
    runs = shifted(-0.1)
    for number in range(9):
        runs += losses(f"b{number}", {seed: 1.0 + (-1) ** seed for seed in range(8)})
    found = compare(study_of(runs), "lora")[0]
    assert found.p == 2 / 2**8
    assert found.corrected == pytest.approx(10 * 2 / 2**8)
    assert (found.verdict, found.interval_says) == (Verdict.OPEN, Verdict.BETTER)
