"""A study's file: what it may say, and how it is told where it is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.study import Exam, Space, Tuning, read_study
from dynlora.cli.job_parser import check_keys
from dynlora.errors import ConfigError
from tests.harness.studies import TUNE, make_study, study_values

ROOT = Path(__file__).parents[3]


def refuse(tmp_path: Path, values: Any) -> str:
    """Return why a study is refused; its file is named in every case."""
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=re.escape(str(path))) as error:
        read_study(path, check_keys)
    return str(error.value).replace(str(path), "FILE")


def test_a_study_says_what_is_compared(tmp_path: Path) -> None:
    study = make_study(tmp_path, description="Why?", budgets=[1, 8], scale=4, tune=TUNE)
    assert (study.name, study.description) == ("small", "Why?")
    assert study.results == tmp_path / "results"
    assert list(study.methods) == ["lora", "dynamic"]
    assert (study.budgets, study.seeds, study.scale) == ((1, 8), (0, 1), 4.0)
    assert study.exam == Exam(split="validation", splits={}, max_rows=None)
    assert study.tuning == Tuning(
        trials=3,
        seed=1000,
        learning_rate=Space(low=1e-3, high=1e-1),
        scale=Space(low=1.0, high=8.0),
        metric="loss",
    )


def test_the_parts_that_may_be_left_out_are_none(tmp_path: Path) -> None:
    study = make_study(tmp_path, tune=None, evaluate=None)
    assert (study.tuning, study.exam, study.scale, study.description) == (None, None, 2.0, "")


def test_numbers_may_be_written_as_yaml_takes_for_a_text(tmp_path: Path) -> None:
    tuning = make_study(tmp_path, tune=TUNE | {"learning_rate": ["1e-3", "3e-2"]}).tuning
    assert tuning is not None
    assert tuning.learning_rate == Space(low=1e-3, high=3e-2)


def test_a_value_can_be_chosen_from_a_list(tmp_path: Path) -> None:
    tuning = make_study(tmp_path, tune=TUNE | {"scale": {"choices": [4, 1, 2]}}).tuning
    assert tuning is not None
    assert tuning.scale == Space(low=1.0, high=4.0, choices=(4.0, 1.0, 2.0))
    assert tuning.scale.holds(2.0)
    assert not tuning.scale.holds(3.0)


def test_a_task_can_have_a_split_of_its_own_for_the_exam(tmp_path: Path) -> None:
    exam = make_study(tmp_path, evaluate={"split": "validation", "splits": {"rows": "test"}}).exam
    assert exam is not None
    assert (exam.of("rows"), exam.of("others")) == ("test", "validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {}}, "unknown key `method` in FILE: the nearest valid name is `methods`."),
        ({"zzz": 1}, "unknown key `zzz` in FILE: valid names are `description`, `results`, "),
        ({"methods": None}, "`methods` in FILE must be keys and values, got null."),
        ({"seeds": []}, "`seeds` in FILE must be a list of at least one number, got []."),
        ({"seeds": 3}, "`seeds` in FILE must be a list of at least one number, got 3."),
        ({"seeds": [1, 1]}, "`seeds` in FILE must be different numbers, got [1, 1]."),
        ({"seeds": [-1]}, "`seeds` in FILE must be whole numbers of at least 0, got -1."),
        ({"budgets": [0]}, "`budgets` in FILE must be whole numbers of at least 1, got 0."),
        ({"budgets": [True]}, "`budgets` in FILE must be whole numbers of at least 1, got True."),
        ({"scale": 0}, "`scale` in FILE must be a number above 0, got 0."),
        ({"scale": "wide"}, "`scale` in FILE must be a number above 0, got wide."),
        ({"results": " "}, "`results` in FILE must be a text, got  ."),
        ({"models": {"a/b": {}}}, "`models` in FILE must be names made of letters, digits and"),
        ({"tune": TUNE | {"trials": 0}}, "`tune.trials` in FILE must be a whole number of at"),
        ({"tune": TUNE | {"trial": 3}}, "unknown key `tune.trial` in FILE: the nearest"),
        ({"tune": TUNE | {"seed": 1}}, "`tune.seed` in FILE must be none of `seeds`, [0, 1], wh"),
        (
            {"tune": {"trials": 3, "seed": 9}},
            "`tune.learning_rate` in FILE must be given, or `tune.scale`: there is nothing to",
        ),
        (
            {"tune": TUNE | {"scale": [8, 1]}},
            "`tune.scale` in FILE must be [lowest, highest], or {choices: [...]} for values of",
        ),
        (
            {"tune": TUNE | {"scale": {"choices": []}}},
            "`tune.scale.choices` in FILE must be a list of at least one number, got [].",
        ),
        ({"evaluate": {}}, "`evaluate.split` must be given in FILE, got nothing."),
        (
            {"evaluate": {"split": "test", "splits": {"cola": "x"}}},
            "`evaluate.splits` in FILE must be by task, one of rows, got cola.",
        ),
        (
            {"evaluate": {"split": "test", "max_rows": 0}},
            "`evaluate.max_rows` in FILE must be a whole number of at least 1, got 0.",
        ),
        (
            {"base": {"training": {"epoch": 1}}},
            "unknown key `training.epoch` in base in FILE: the nearest valid name is",
        ),
        (
            {"methods": {"lora": {"dynamic": {"evnts": 1}}}},
            "unknown key `dynamic.evnts` in methods.lora in FILE: the nearest valid name is",
        ),
        (
            {"tasks": {"rows": {"lora": {"r": 8}}}},
            "`lora.r` must not stand in tasks.rows in FILE: `budgets` sets it. Leave it out.",
        ),
        ({"models": {"tiny": 3}}, "`models.tiny` in FILE must be keys and values, got 3."),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert refuse(tmp_path, study_values() | changes).startswith(message)


@pytest.mark.parametrize("key", ["results", "models", "tasks", "methods", "budgets", "seeds"])
def test_what_must_be_there_is_asked_for(tmp_path: Path, key: str) -> None:
    values = study_values()
    del values[key]
    assert refuse(tmp_path, values) == f"`{key}` must be given in FILE, got nothing."


@pytest.mark.parametrize("key", ["models", "tasks", "methods"])
def test_something_must_be_compared(tmp_path: Path, key: str) -> None:
    message = f"`{key}` in FILE must be at least one entry, `name: {{keys of a job}}`, got {{}}."
    assert refuse(tmp_path, study_values() | {key: {}}) == message


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got .*nowhere.yaml, which is not a file"):
        read_study(tmp_path / "nowhere.yaml", check_keys)
    assert refuse(tmp_path, [1]).startswith("STUDY must hold keys and values")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="STUDY must be a YAML file"):
        read_study(broken, check_keys)
    (tmp_path / "a b.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"made of letters, .* got 'a b'"):
        read_study(tmp_path / "a b.yaml", check_keys)
