"""A study's runs: what each combination stands for, and by which key it is found again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.runs import COSMETIC, Cell, Choice, key_of, plain
from dynlora.errors import ConfigError
from tests.harness.studies import TUNE, make_jobs

LORA = Cell("tiny", "rows", "lora", 2)


def test_base_model_task_and_method_are_laid_over_one_another_in_this_order(
    tmp_path: Path,
) -> None:
    steps = {
        key: {"training": {"epochs": value}} for key, value in zip("bmtx", range(3, 7), strict=True)
    }
    path = {"data": {"path": "d"}}
    jobs = make_jobs(
        tmp_path,
        base=steps["b"],
        models={"tiny": steps["m"], "bare": {"model": {"path": "bare"}}},
        tasks={"rows": steps["t"], "plain": path},
        methods={"lora": {}, "dynamic": steps["x"]},
        evaluate=None,
    )
    epochs = {
        (model, task, method): config.training.epochs
        for (model, task, method), config in jobs.configs.items()
    }
    assert epochs["bare", "plain", "lora"] == 3
    assert epochs["tiny", "plain", "lora"] == 4
    assert epochs["tiny", "rows", "lora"] == 5
    assert epochs["tiny", "rows", "dynamic"] == 6


def test_budget_scale_and_seed_are_what_the_study_says(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, budgets=[2, 8], scale=3)
    run = jobs.final(Cell("tiny", "rows", "dynamic", 8), 1, None)
    assert (run.config.lora.r, run.config.lora.lora_alpha) == (8, 24.0)
    assert (run.config.training.seed, run.config.dynamic.seed) == (1, 1)
    assert run.config.training.learning_rate == 1e-2
    assert run.name == "tiny/rows/dynamic/r8/s1"
    tuned = jobs.final(run.cell, 1, Choice(learning_rate=0.5, scale=0.25))
    assert (tuned.config.training.learning_rate, tuned.config.lora.lora_alpha) == (0.5, 2.0)


def test_every_combination_is_a_cell(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, budgets=[1, 2], models={"other": {"model": {"path": "m"}}})
    assert len(set(jobs.cells())) == len(jobs.cells()) == 2 * 1 * 2 * 2


def test_a_trial_is_never_asked_about_the_rows_of_the_exam(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    assert jobs.final(LORA, 0, None).exam is not None
    assert jobs.trial(LORA, 9, 0, jobs.defaults(LORA)).exam is None


def test_the_key_names_what_decides_the_result(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    others = [
        jobs.final(LORA, 1, None),
        jobs.final(replace(LORA, method="dynamic"), 0, None),
        jobs.final(LORA, 0, Choice(learning_rate=0.011, scale=2.0)),
        jobs.final(LORA, 0, Choice(learning_rate=0.01, scale=2.5)),
        jobs.trial(LORA, 0, 0, jobs.defaults(LORA)),
        make_jobs(tmp_path, evaluate={"max_rows": 4}).final(LORA, 0, None),
        make_jobs(tmp_path, base={"training": {"epochs": 3}}).final(LORA, 0, None),
    ]
    assert len({run.key, *(other.key for other in others)}) == len(others) + 1
    assert make_jobs(tmp_path).final(LORA, 0, None).key == run.key
    assert run.key == jobs.final(LORA, 0, jobs.defaults(LORA)).key


@pytest.mark.parametrize("path", COSMETIC, ids=".".join)
def test_what_changes_no_result_changes_no_key(tmp_path: Path, path: tuple[str, ...]) -> None:
    values = plain(make_jobs(tmp_path).final(LORA, 0, None).config)
    changed: Any = json.loads(json.dumps(values))
    inside = changed
    for section in path[:-1]:
        inside = inside[section]
    if path != ("overwrite",):
        assert path[-1] in inside, "a key that no job has would be without effect here"
    inside[path[-1]] = "anything"
    assert key_of(changed, None) == key_of(values, None)


def test_a_setting_that_is_newer_than_a_record_counts_as_at_its_default(tmp_path: Path) -> None:
    values = plain(make_jobs(tmp_path).final(LORA, 0, None).config)
    old: Any = json.loads(json.dumps(values))
    del old["dynamic"]["hysteresis"], old["adalora"]
    assert key_of(old, None) == key_of(values, None)
    old["dynamic"]["hysteresis"] = 0.9
    assert key_of(old, None) != key_of(values, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"lora": {"method": "loar"}}},
            r"`method` must be one of .*, got loar.* \(model tiny, task rows and method lora of ",
        ),
        (
            {"budgets": [2, 8], "methods": {"a": {"method": "adalora", "adalora": {"init_r": 4}}}},
            r"`adalora.init_r` must be above lora.r=8, got 4.*method a of ",
        ),
        (
            {"tasks": {"rows": {"data": {"validation_rows_from_train": None}}}},
            r"`evaluate.split` must be none .* a run uses, train, validation, got validation: name",
        ),
        ({"evaluate": {"split": "train"}}, r"a run uses, train, got train: name another"),
        (
            {"tune": {**TUNE, "learning_rate": [0.02, 0.1]}},
            r"`tune.learning_rate` must hold the default, 0.01, .* got \[0.02, 0.1\]: widen it",
        ),
        (
            {"tune": {**TUNE, "scale": {"choices": [1, 4]}}},
            r"`tune.scale` must hold the default, 2, .* got \[1.0, 4.0\]: widen it",
        ),
        (
            {"tune": {**TUNE, "metric": "pearson"}},
            r"`tune.metric` must be a metric of `task: sequence_classification`, .* got pearson",
        ),
        ({"models": {"tiny": {"model": {"path": None}}}}, r"one source is required, `model.path`"),
    ],
)
def test_a_combination_that_is_no_job_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_jobs(tmp_path, **changes)
