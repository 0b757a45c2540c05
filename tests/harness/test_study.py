"""A study: its file, its combinations, and the keys of its runs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.runs import COSMETIC, Choice, Combination, key_of, merge, plain
from benchmarks.harness.study import OWN_KEYS, read_study
from dynlora.errors import ConfigError
from tests.harness.studies import DYNAMIC, LORA, TUNE, make_jobs, make_study, study_values


def refuse(tmp_path: Path, values: Any) -> str:
    """Return the error for a study, which must name the file."""
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=re.escape(str(path))) as error:
        read_study(path)
    return str(error.value).replace(str(path), "FILE")


def test_a_study_is_read_with_its_defaults(tmp_path):
    study = make_study(tmp_path, description="Why?", budgets=[1, 8], scale=4, tune=TUNE)
    assert (study.name, study.description) == ("small", "Why?")
    assert study.results == tmp_path / "results"
    assert (study.budgets, study.seeds, study.scale) == ((1, 8), (0, 1), 4.0)
    assert study.tune is not None
    assert (study.tune.trials, study.tune.seed, study.tune.metric) == (3, 1000, "loss")
    bare = make_study(tmp_path, tune=None, evaluate=None)
    assert (bare.tune, bare.evaluate, bare.scale, bare.description) == (None, None, 2.0, "")
    exam = {"split": "validation", "splits": {"rows": "test"}}
    found = make_study(tmp_path, evaluate=exam).evaluate
    assert found is not None
    assert (found.split_of("rows"), found.split_of("others")) == ("test", "validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, r"unknown key `method` .* is `methods`\."),
        ({"zzz": 1}, r"unknown key `zzz` .* are `description`, `results`, "),
        ({"methods": None}, r"`methods` must be keys and values, but got null"),
        ({"seeds": []}, r"`seeds` must have at least one entry, but got \[\]"),
        ({"seeds": [1, 1]}, r"`seeds` must be different numbers, but got \[1, 1\]"),
        ({"seeds": [-1]}, r"`seeds.0` must be greater than or equal to 0, but got -1"),
        ({"budgets": [True]}, r"`budgets.0` must be a whole number, but got True"),
        ({"scale": "wide"}, r"`scale` must be a number above 0, but got wide"),
        ({"models": {"a/b": {}}}, r"`models.a/b` must be a name of letters, digits"),
        ({"tune": TUNE | {"trial": 3}}, r"unknown key `tune.trial` .* is `tune.trials`\."),
        ({"tune": TUNE | {"seed": 1}}, r"`tune.seed` must be none of `seeds`, \[0, 1\], but got 1"),
        ({"tune": {"trials": 3, "seed": 9}}, r"`tune.learning_rate` or `tune.scale` must be given"),
        ({"tune": TUNE | {"scale": [8, 1]}}, r"`tune.scale` must be \[low, high\] or {choices"),
        ({"evaluate": {}}, r"`evaluate.split` must be given, but got nothing"),
        ({"evaluate": {"split": "test", "splits": {"a": "x"}}}, r".*must name tasks, .* got a"),
        ({"base": {"training": {"epoch": 1}}}, r"unknown key `training.epoch` .*base in FILE"),
    ],
)  # fmt: skip
def test_an_invalid_value_is_named_with_its_key(tmp_path, changes, message):
    assert re.match(message, refuse(tmp_path, study_values() | changes))


@pytest.mark.parametrize("key", OWN_KEYS)
def test_no_fragment_may_set_a_key_of_the_study(tmp_path, key):
    section, _, last = key.rpartition(".")
    fragment = {section: {last: 1}} if section else {last: 1}
    told = refuse(tmp_path, study_values() | {"methods": {"a": fragment}})
    assert told.startswith(f"`{key}` must not be in methods.a in FILE: ")


def test_a_file_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"got .*nowhere.yaml, which is not a file"):
        read_study(tmp_path / "nowhere.yaml")
    assert refuse(tmp_path, [1]).startswith("STUDY must contain keys and values")
    for name, text, message in (("broken", "a: [", "a YAML file"), ("a b", "a: 1", "got 'a b'")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_study(path)


def test_fragments_merge_by_section_and_the_last_value_wins(tmp_path):
    base = {"training": {"epochs": 3, "seed": 1}, "lora": {"t": ["a", "b"]}, "b": {"c": 1}}
    over = {"training": {"epochs": 5}, "lora": {"t": ["c"]}, "b": None}
    assert merge(base, {}, over) == {
        "training": {"epochs": 5, "seed": 1}, "lora": {"t": ["c"]}, "b": None,
    }  # fmt: skip
    assert base["training"] == {"epochs": 3, "seed": 1}, "fragments must not change"
    base, model, task, method = ({"training": {"epochs": n}} for n in (3, 4, 5, 6))
    jobs = make_jobs(
        tmp_path, base=base, evaluate=None, methods={"lora": {}, "dynamic": method},
        models={"tiny": model, "bare": {"model": {"path": "bare"}}},
        tasks={"rows": task, "plain": {"data": {"path": "d"}}},
    )  # fmt: skip
    epochs = {"/".join(names): config.training.epochs for names, config in jobs.configs.items()}
    expected = {
        "bare/plain/lora": 3, "tiny/plain/lora": 4, "tiny/rows/lora": 5, "tiny/rows/dynamic": 6
    }  # fmt: skip
    assert expected.items() <= epochs.items()


def test_the_study_sets_budget_scale_and_seed(tmp_path):
    jobs = make_jobs(tmp_path, budgets=[2, 8], scale=3)
    assert len(set(jobs.combinations())) == 4
    run = jobs.final(Combination("tiny", "rows", "dynamic", 8), 1, None)
    assert (run.config.lora.r, run.config.lora.lora_alpha) == (8, 24.0)
    assert (run.config.training.seed, run.config.dynamic.seed) == (1, 1)
    assert run.name == "tiny/rows/dynamic/r8/s1"
    tuned = jobs.final(run.combination, 1, Choice(learning_rate=0.5, scale=0.25))
    assert (tuned.config.training.learning_rate, tuned.config.lora.lora_alpha) == (0.5, 2.0)


def test_the_key_depends_on_everything_that_affects_the_result(tmp_path):
    jobs = make_jobs(tmp_path)
    run = jobs.final(LORA, 0, None)
    others = [
        jobs.final(LORA, 1, None),
        jobs.final(DYNAMIC, 0, None),
        jobs.final(LORA, 0, Choice(learning_rate=0.011, scale=2.0)),
        jobs.final(LORA, 0, Choice(learning_rate=0.01, scale=2.5)),
        jobs.trial(LORA, 0, 0, jobs.defaults(LORA)),
        make_jobs(tmp_path, evaluate={"max_rows": 4}).final(LORA, 0, None),
        make_jobs(tmp_path, base={"training": {"epochs": 3}}).final(LORA, 0, None),
    ]
    assert len({run.key, *(other.key for other in others)}) == len(others) + 1
    assert make_jobs(tmp_path).final(LORA, 0, None).key == run.key
    assert run.key == jobs.final(LORA, 0, jobs.defaults(LORA)).key
    assert jobs.trial(LORA, 9, 0, jobs.defaults(LORA)).exam is None
    assert replace(run, seed=5).key == run.key, "only the job and the exam count"


def test_the_key_ignores_settings_without_effect_and_missing_defaults(tmp_path):
    values = plain(make_jobs(tmp_path).final(LORA, 0, None).config)
    changed: Any = json.loads(json.dumps(values))
    for *sections, last in COSMETIC:
        inside = changed
        for section in sections:
            inside = inside[section]
        assert last in inside or last == "overwrite"
        inside[last] = "anything"
    del changed["dynamic"]["hysteresis"], changed["adalora"]
    assert key_of(changed, None) == key_of(values, None)
    changed["dynamic"]["hysteresis"] = 0.9
    assert key_of(changed, None) != key_of(values, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"lora": {"method": "loar"}}},
         r"`method` must be one of .* loar.* \(model tiny, task rows and method lora of "),
        ({"budgets": [2, 8], "methods": {"a": {"method": "adalora", "adalora": {"init_r": 4}}}},
         r"`adalora.init_r` .*lora.r=8, .*got 4.*method a of "),
        ({"evaluate": {"split": "train"}}, r"a run uses, train, but got train"),
        ({"tasks": {"rows": {"data": {"validation_rows_from_train": None}}}},
         r"`evaluate.split` must be none .* a run uses, train, validation, but got validation"),
        ({"tune": {**TUNE, "learning_rate": [0.02, 0.1]}},
         r"`tune.learning_rate` must contain the default, 0.01, .* got \[0.02, 0.1\]"),
        ({"tune": {**TUNE, "metric": "pearson"}},
         r"`tune.metric` must be a metric of `task: sequence_classification`, .* got pearson"),
    ],
)  # fmt: skip
def test_a_combination_that_is_no_job_is_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_jobs(tmp_path, **changes)
