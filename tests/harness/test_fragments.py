"""Parts of a job's configuration, laid over one another."""

import pytest

from benchmarks.harness.fragments import OWN_KEYS, check_free, merge
from dynlora.errors import ConfigError


def test_sections_are_merged_and_of_all_else_the_last_counts() -> None:
    base = {"training": {"epochs": 3, "seed": 1}, "task": "regression", "lora": {"t": ["a", "b"]}}
    over = {"training": {"epochs": 5}, "lora": {"t": ["c"]}, "data": {"path": None}}
    assert merge(base, {}, over) == {
        "training": {"epochs": 5, "seed": 1},
        "task": "regression",
        "lora": {"t": ["c"]},
        "data": {"path": None},
    }
    assert base["training"] == {"epochs": 3, "seed": 1}, "no fragment is changed"


def test_null_takes_the_place_of_a_value_and_a_section_that_of_null() -> None:
    assert merge({"a": {"b": 1}}, {"a": {"b": None}}) == {"a": {"b": None}}
    assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.mark.parametrize("key", OWN_KEYS)
def test_what_the_study_sets_may_stand_in_no_fragment(key: str) -> None:
    section, _, last = key.rpartition(".")
    fragment = {section: {last: 1}} if section else {last: 1}
    with pytest.raises(ConfigError, match=rf"`{key}` must not stand in methods.a in s.yaml: .+"):
        check_free(fragment, "methods.a in s.yaml")
