"""Studies: records grouped, put in order and found again, and mixtures that are refused."""

from pathlib import Path

import pytest

from benchmarks.harness.report.record import Cell, Record, as_record
from benchmarks.harness.report.study import group
from dynlora.errors import RunFileError
from tests.harness.report.records import values

CELL = Cell("minilm", "mrpc", 8)


def records(*runs: dict, folder: str = "first") -> list[Record]:
    return [as_record(Path(f"results/{folder}/{n}.json"), run) for n, run in enumerate(runs)]


def test_studies_are_in_the_order_of_their_names_and_runs_in_that_of_the_seed():
    made = records(values(seed=2), values(seed=0), values(seed=1))
    other = records(values(study="a"), folder="a")
    studies = group([*made, *other])
    assert [study.name for study in studies] == ["a", "first"]
    assert [run.seed for run in studies[1].runs(CELL, "lora")] == [0, 1, 2]


def test_the_order_of_the_records_makes_no_difference():
    made = records(*(values(seed=seed, method=method) for method in "ba" for seed in (1, 0)))
    assert group(made) == group(made[::-1])


def test_methods_are_in_alphabetical_order_with_the_reference_first():
    (study,) = group(records(*(values(method=method) for method in ("b", "lora", "a"))))
    assert study.methods(first="lora") == ["lora", "a", "b"]
    assert study.methods(first="missing") == ["a", "b", "lora"]


def test_only_completed_and_finite_final_runs_are_averaged():
    runs = [
        values(seed=0),
        values(seed=1, status="failed"),
        {**values(seed=2), "validation": {"loss": None, "accuracy": 0.7}},
        values(seed=3, kind="trial"),
    ]
    (study,) = group(records(*runs))
    assert list(study.usable(CELL, "lora")) == [0]
    assert study.not_finite(CELL, "lora") == [2]


def test_budgets_are_in_the_order_of_their_size():
    (study,) = group(records(*(values(budget=budget) for budget in (16, 2, 8))))
    assert [cell.budget for cell in study.budgets(("minilm", "mrpc"))] == [2, 8, 16]


def test_one_name_in_two_folders_is_refused():
    mixed = [*records(values()), *records(values(seed=1), folder="other")]
    with pytest.raises(RunFileError, match=r"study 'first' .* results/first and results/other"):
        group(mixed)


def test_two_records_of_one_run_are_refused_with_both_files():
    with pytest.raises(RunFileError, match=r"first/0.json and results/first/1.json .* seed 7"):
        group(records(values(seed=7), values(seed=7, key="other")))


def test_trials_of_one_seed_are_many_runs():
    assert group(records(*(values(kind="trial", key=str(n)) for n in range(3))))


def test_two_main_metrics_of_one_task_are_refused():
    other = values(seed=1, main_metric="f1", validation={"loss": 1.0, "f1": 0.5})
    with pytest.raises(RunFileError, match=r"one main metric, got accuracy in .* and f1 in"):
        group(records(values(), other))


def test_descriptions_that_differ_are_all_kept():
    (study,) = group(records(values(description="b"), values(seed=1, description="a")))
    assert study.descriptions == ["a", "b"]
