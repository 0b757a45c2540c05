"""The check of `dynlora advise`: full runs from records, and the table of answers."""

import csv
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.advise import CASES, Case, full_runs, job_of, table_of


def test_full_runs_are_the_final_runs_of_lora_at_both_ranks(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    found = full_runs(Case("recovery_wider", "reviews"))
    with Path("benchmarks/results/recovery_wider.csv").open(encoding="utf-8") as file:
        runs = [row for row in csv.DictReader(file) if row["kind"] == "final"]
    losses = [
        [
            float(run["validation.loss"])
            for run in runs
            if (run["task"], run["method"], run["budget"]) == ("reviews", "lora", r)
        ]
        for r in ("2", "8")
    ]
    assert found["full_seeds"] == len(losses[0]) == 10
    assert found["full_gain"] == pytest.approx(1 - fmean(losses[1]) / fmean(losses[0]))


def test_each_case_has_a_job_and_full_runs(monkeypatch, request, tmp_path):
    monkeypatch.chdir(request.config.rootpath)
    for case in CASES:
        config = job_of(case, {"data": tmp_path, "models": tmp_path})
        assert (config.lora.r, config.training.seed) == (case.r, 1000)
        assert full_runs(case)["full_seeds"] >= 3


def test_answers_are_right_wrong_or_undecided():
    row = {"study": "s", "task": "t", "r": 2, "full_error": 0.01, "learned": 0.5, "seconds": 9}
    table = table_of(
        [
            row | {"gain": 0.05, "low": 0.03, "high": 0.07, "full_gain": 0.03},
            row | {"gain": 0.0, "low": -0.01, "high": 0.01, "full_gain": 0.03},
            row | {"gain": 0.01, "low": 0.0, "high": 0.03, "full_gain": 0.0},
            row | {"gain": None, "low": None, "high": None, "full_gain": 0.0},
        ]
    )
    assert table.endswith("1 right, 1 wrong, 2 undecided; estimate on the right side: 2.")
