"""`dynlora schema`: editors are told what `dynlora train` accepts."""

import json
from functools import cache
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dynlora.cli.main import main
from dynlora.errors import ConfigError
from dynlora.train.config.keys import job_schema
from dynlora.train.config.keys import settings as job_settings
from dynlora.train.config_file import make_job

MINIMAL = {"output": "out", "model": {"name": "m"}, "data": {"name": "d"}}
KEYS = job_settings()
Values = dict[str, Any]


@cache
def validator():
    return Draft202012Validator(job_schema())


def minimal(changes):
    """Return the smallest configuration, with values at dotted keys."""
    values = json.loads(json.dumps(MINIMAL))
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return values


def test_it_prints_the_schema_with_json_and_quiet_too(capsys):
    for options in ([], ["--json"], ["--quiet"]):
        assert main(["schema", *options]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        assert json.loads(printed.out) == job_schema()
    assert job_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(job_schema())


def test_a_resolved_configuration_is_valid(train, capsys):
    assert train("--print_config") == 0
    validator().validate(yaml.safe_load(capsys.readouterr().out))


def test_every_key_has_a_text_and_a_valid_default():
    assert len(KEYS) >= 90
    for key, inside in KEYS.items():
        assert len(inside["description"].split()) >= 2
        assert ("default" in inside) == (key != "output")
        assert key == "output" or validator().is_valid(minimal({key: inside["default"]})), key
    assert KEYS["lora.lora_dropout"]["description"] == (
        "Dropout on the adapter's input. [lora_dropout]"
    )


@pytest.mark.parametrize("missing", ["output", "model", "data"])
def test_what_has_no_default_is_required(missing):
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    (error,) = validator().iter_errors(values)
    assert f"'{missing}' is a required property" in error.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ouput", "there"), ("lora.rank", 8), ("lora.r", "eight"), ("lora.r", 2.5),
        ("lora.target_modules", "query"), ("lora.target_modules", [1]), ("method", "qlora"),
        ("data.text", None), ("overwrite", 1), ("training.bf16", "often"),
        ("dynamic.importance", "signall"), ("dynamic.preset", "papr"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_refused_by_both(key, value):
    assert not validator().is_valid(minimal({key: value}))
    with pytest.raises(ConfigError):
        make_job(minimal({key: value}))


def test_a_stated_limit_is_the_limit_that_is_enforced():
    """A value outside is refused by the configuration too; the end of a closed range is not."""
    checked = 0
    for key, inside in KEYS.items():
        for number in inside.get("anyOf", [inside]):
            for limit in number.keys() & LIMITS.keys():
                end, open_end = number[limit], limit.startswith("exclusive")
                near = LIMITS[limit] * (1 if number["type"] == "integer" else 1e-6)
                with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
                    make_job(minimal({key: end if open_end else end + near}))
                if not open_end and key not in DEPEND:
                    make_job(minimal({key: end}))
                checked += 1
    assert checked >= 45


LIMITS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
DEPEND = {"dynamic.first_event"}
"""Keys whose end is refused only because of another key."""


@st.composite
def configurations(draw):
    """Configurations of values that the schema's types allow, and of some that they do not."""
    keys = draw(st.lists(st.sampled_from(list(KEYS)), max_size=4))
    return minimal({key: draw(st.sampled_from([*of_type(KEYS[key]), *ODD])) for key in keys})


ODD = [None, True, 0, 1.5, "word", ["a"], [], [None], {"a": 1}]
TYPES = {
    "integer": [-2, 0, 1, 9, 300],
    "number": [-2, 0, 1, 9, 0.25, 1.5],
    "string": ["a", "folder/of mine", "x: y", "latest"],
    "boolean": [True, False],
    "null": [None],
    "array": [[], ["a"], ["tensorboard"]],
}


def of_type(schema):
    for part in schema.get("anyOf", [schema]):
        yield from part.get("enum", [part["const"]] if "const" in part else TYPES[part["type"]])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(values=configurations())
def test_the_command_and_the_schema_agree(values):
    """Only rules between keys, which the schema does not know, may refuse a valid file."""
    complaint = ""
    try:
        make_job(values)
    except ConfigError as error:
        complaint = str(error)
    if not complaint:
        assert list(validator().iter_errors(values)) == []
    elif validator().is_valid(values):
        kinds = ("a text", "a whole number", "a number", "a list", "true or false")
        assert not any(f"must be {kind}" in complaint for kind in kinds)
        assert "unknown key" not in complaint
