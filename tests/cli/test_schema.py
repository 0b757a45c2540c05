"""`dynlora schema`: what an editor is told agrees with what `dynlora train` takes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from dynlora.cli.job_parser import build, parse_job, valid_keys
from dynlora.cli.main import main
from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig
from tests.jobs import job_values
from tests.processes import run_in_group

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
MINIMAL = {"output": "out", "model": {"name": "m"}, "data": {"name": "d"}}
Values = dict[str, Any]


@pytest.fixture
def schema(capsys: pytest.CaptureFixture[str]) -> Values:
    assert main(["schema"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found: Values = json.loads(printed.out)
    return found


@cache
def validator() -> Draft202012Validator:
    run = run_in_group(
        [sys.executable, "-m", "dynlora.cli.main", "schema"], capture_output=True, check=True
    )
    return Draft202012Validator(json.loads(run.stdout))


def set_key(key: str, value: Any) -> Values:
    """Return the least configuration with one dotted key set."""
    section, _, leaf = key.rpartition(".")
    values: Values = json.loads(json.dumps(MINIMAL))
    (values.setdefault(section, {}) if section else values)[leaf] = value
    return values


def leaves(schema: Values, prefix: str = "") -> Iterator[tuple[str, Values]]:
    for name, inside in schema["properties"].items():
        if "properties" in inside:
            yield from leaves(inside, f"{prefix}{name}.")
        else:
            yield prefix + name, inside


def test_it_is_a_schema_of_draft_2020_12(schema: Values) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    validator().validate(yaml.safe_load(path.read_text()))


def test_a_resolved_configuration_is_valid(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_values(Path("m"), Path("d"), Path("o"))))
    assert main(["train", str(path), "--print_config"]) == 0
    validator().validate(yaml.safe_load(capsys.readouterr().out))


def test_its_keys_are_those_of_the_parser_each_with_its_text(schema: Values) -> None:
    hints = dict(valid_keys())
    found = dict(leaves(schema))
    assert found.keys() == {key for key, hint in hints.items() if not is_dataclass(hint)}
    assert all(len(inside["description"].split()) >= 2 for inside in found.values())
    assert found["lora.lora_dropout"]["description"] == (
        "Dropout on the adapter's input, in [0, 1). [lora_dropout]"
    )


def test_every_default_is_told_and_is_valid(schema: Values) -> None:
    for key, inside in leaves(schema):
        if key == "output":
            assert "default" not in inside
        else:
            assert validator().is_valid(set_key(key, inside["default"])), key


@pytest.mark.parametrize("missing", ["output", "model", "data"])
def test_what_has_no_default_is_required(missing: str) -> None:
    values = {key: value for key, value in MINIMAL.items() if key != missing}
    (error,) = validator().iter_errors(values)
    assert f"'{missing}' is a required property" in error.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ouput", "there"),
        ("lora.rank", 8),
        ("lora.r", "eight"),
        ("lora.r", 2.5),
        ("lora.r", 0),
        ("lora.lora_dropout", 1),
        ("lora.target_modules", "query"),
        ("lora.target_modules", [1]),
        ("method", "qlora"),
        ("data.text", None),
        ("data.max_length", 7),
        ("overwrite", 1),
        ("training.schedule", "linera"),
        ("training.bf16", "often"),
        ("training.epochs", 0),
        ("training.max_steps", 0),
        ("dynamic.importance", "signall"),
    ],
)
def test_a_wrong_key_or_value_is_found(key: str, value: object, tmp_path: Path) -> None:
    values = set_key(key, value)
    assert not validator().is_valid(values)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError):
        parse_job([str(path)])


def test_a_stated_range_is_the_range_that_is_enforced(schema: Values) -> None:
    """What lies outside is refused by the configuration too; the end that is inside is not."""
    checked = 0
    for key, inside in leaves(schema):
        numbers = [part for part in inside.get("anyOf", [inside]) if part.keys() & LIMITS.keys()]
        for limit, outward in LIMITS.items():
            for number in numbers:
                if limit not in number:
                    continue
                end, whole = number[limit], number["type"] == "integer"
                near = outward * (1 if whole else 1e-6)
                outside = end if limit.startswith("exclusive") else end + near
                with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
                    build(JobConfig, set_key(key, outside))
                if not limit.startswith("exclusive") and key not in DEPEND:
                    build(JobConfig, set_key(key, end))
                checked += 1
    assert checked >= 35


LIMITS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
DEPEND = {"dynamic.first_event"}
"""Keys whose end is refused only for what another key says."""


@st.composite
def configurations(draw: st.DrawFn) -> Values:
    """Configurations of values that the parser's types allow, and of some that they do not."""
    values = json.loads(json.dumps(MINIMAL))
    for key, hint in draw(st.lists(st.sampled_from(LEAVES), max_size=4)):
        section, _, leaf = key.rpartition(".")
        value = draw(st.one_of(of_type(hint), st.sampled_from(ODD)))
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return values


LEAVES = [(key, hint) for key, hint in valid_keys() if not is_dataclass(hint)]
ODD = [None, True, 0, 1.5, "word", ["a"], [], [None], {"a": 1}]
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-2, 300),
    float: st.one_of(st.integers(-2, 300), st.floats(-2, 300, allow_nan=False)),
    str: st.sampled_from(["a", "folder/of mine", "x: y", "latest"]),
    bool: st.booleans(),
    type(None): st.none(),
}


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in {Union, UnionType}:
        return st.one_of(*map(of_type, get_args(hint)))
    if get_origin(hint) is tuple:
        return st.lists(of_type(get_args(hint)[0]), max_size=3)
    return SCALARS[hint]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=configurations())
def test_what_the_command_takes_is_valid(values: Values, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("jobs") / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    try:
        parse_job([str(path)])
    except ConfigError:
        return
    assert list(validator().iter_errors(values)) == []


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(values=configurations())
def test_what_is_valid_has_types_that_the_command_takes(
    values: Values, tmp_path_factory: Any
) -> None:
    """Only a range, or how values fit together, may still be wrong with a valid configuration."""
    if not validator().is_valid(values):
        return
    path = tmp_path_factory.mktemp("jobs") / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    complaint = ""
    try:
        parse_job([str(path)])
    except ConfigError as error:
        complaint = str(error)
    for words in ("unknown key", "must be a text", "must be a whole number", "must be true"):
        assert words not in complaint


def test_every_section_forbids_other_keys_and_describes_itself(schema: Values) -> None:
    sections = {
        name: kind for name, kind in get_type_hints(JobConfig).items() if is_dataclass(kind)
    }
    for name, kind in sections.items():
        section = schema["properties"][name]
        assert section["additionalProperties"] is False
        keys = {field.name for field in fields(kind)} | ({"preset"} if name == "dynamic" else set())
        assert set(section["properties"]) == keys
        assert section["description"]


def test_the_presets_are_told() -> None:
    assert validator().is_valid(set_key("dynamic.preset", "paper"))
    assert not validator().is_valid(set_key("dynamic.preset", "papr"))


def test_the_schema_is_one_json_object_with_json_and_printed_with_quiet(
    schema: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--json", "--quiet"):
        assert main(["schema", option]) == 0
        assert json.loads(capsys.readouterr().out) == schema


def test_an_argument_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "job.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: unrecognized arguments: job.yaml")


def test_it_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from dynlora.cli.main import main; main(['schema']); "
        "assert 'torch' not in sys.modules"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
