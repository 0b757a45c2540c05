"""`CONFIG --dotted.key value ...` to a `JobConfig`, with jsonargparse.

jsonargparse reads the file, the options and their types. What stands here turns its complaints
into one line that names the key and the nearest valid name.
"""

import argparse
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings  # type: ignore[attr-defined]

from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig

USAGE = "dynlora train CONFIG [--output DIR] [--dotted.key value ...]"
DESCRIPTION = (
    "Train and evaluate as the YAML file CONFIG says. Each key below can stand in CONFIG (a dot "
    "is a level) or on the command line, which wins. null unsets a key."
)
T = TypeVar("T")
OWN_OPTIONS = ("config", "help", "print_config")
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def parse_job(arguments: Sequence[str]) -> JobConfig | None:
    """Return the job that the command line describes; None after `--help` or `--print_config`.

    Args:
        arguments: What follows `train` on the command line.

    Raises:
        ConfigError: If a key or value is unknown, missing or outside its range.
    """
    given = list(arguments)
    if given and not given[0].startswith("-"):
        _check_file(Path(given[0]))
        given.insert(0, "--config")
    elif not {"-h", "--help"} & set(given):
        raise ConfigError(f"CONFIG, a YAML file, must come first: {USAGE}")
    _check_options(given)
    try:
        values = _parser().parse_args(given).as_dict()
    except argparse.ArgumentError as error:
        raise _explain(error) from error
    except SystemExit:  # how argparse ends after --help and --print_config
        return None
    return build(JobConfig, {key: values[key] for key in get_type_hints(JobConfig)})


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` made from plain, already typed, nested values."""
    hints = get_type_hints(kind)
    made = {
        key: build(hints[key], value) if is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return kind(**made)


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dynlora train", usage=USAGE, description=DESCRIPTION, exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    sections = dict(_sections())
    parser.add_class_arguments(JobConfig, skip=set(sections))
    for key, section in sections.items():
        parser.add_class_arguments(section, key)
    return parser


def _sections() -> Iterator[tuple[str, Any]]:
    for key, hint in get_type_hints(JobConfig).items():
        if is_dataclass(hint):
            yield key, hint


def valid_keys(kind: Any = JobConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of the configuration with its type; sections have keys too."""
    for key, hint in get_type_hints(kind).items():
        yield prefix + key, hint
        if is_dataclass(hint):
            yield from valid_keys(hint, f"{prefix}{key}.")


def _check_file(path: Path) -> None:
    """Check that the file is there, is YAML, and has no unknown key."""
    if not path.is_file():
        raise ConfigError(f"CONFIG must be a YAML file, got {path}, which is not a file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"CONFIG must be a YAML file, got {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"CONFIG must hold keys and values, got {path} without any.")
    _check_level(content, JobConfig, "", f" in {path}")


def _check_level(content: Mapping[str, Any], kind: Any, prefix: str, where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise _unknown(dotted, where)
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                inside = ", ".join(field.name for field in fields(hints[key]))
                raise ConfigError(f"`{dotted}` must hold keys, got {value}{where}: {inside}.")
            _check_level(value, hints[key], f"{dotted}.", where)


def _check_options(given: Sequence[str]) -> None:
    known = {key for key, _ in valid_keys()} | set(OWN_OPTIONS)
    for option in given:
        key = option.removeprefix("--").partition("=")[0]
        if option.startswith("--") and key not in known:
            raise _unknown(key, " on the command line")


def _unknown(key: str, where: str) -> ConfigError:
    """Return the error for a key that does not exist, with the names that come nearest."""
    valid = [name for name, _ in valid_keys()]
    near = difflib.get_close_matches(key, valid, n=2, cutoff=0.75)
    leaf = key.rpartition(".")[2]
    leaves = difflib.get_close_matches(leaf, [v.rpartition(".")[2] for v in valid], 2, cutoff=0.7)
    near += [v for v in valid if v.rpartition(".")[2] in leaves and v not in near]
    section = key.rpartition(".")[0] + "."
    same = [v for v in valid if v.startswith(section)] or [v for v in valid if "." not in v]
    names = ", ".join(f"`{name}`" for name in (near[:3] or same))
    advice = f"the nearest valid name is {names}" if near else f"valid names are {names}"
    return ConfigError(f"unknown key `{key}`{where}: {advice}.")


def _explain(error: argparse.ArgumentError) -> ConfigError:
    """Return jsonargparse's complaint in our words; in its own where it is none about a value."""
    text = str(error)
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Got|Given) value: (.*)", text)
    hint = dict(valid_keys()).get(key[1]) if key else None
    if key is None or value is None or hint is None:
        missing = re.search(r"required: (.*)", text)
        if missing:
            return ConfigError(f"`{missing[1]}` must be given, in CONFIG or as --{missing[1]}.")
        return ConfigError(" ".join(text.split()))
    choices = [str(choice) for choice in _choices(hint)]
    near = difflib.get_close_matches(value[1], choices, n=1, cutoff=0.4)
    advice = f" The nearest valid value is {near[0]}." if near else ""
    return ConfigError(f"`{key[1]}` must be {_describe(hint)}, got {value[1]}.{advice}")


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in {Union, UnionType}:
        return " or ".join(_describe(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return "a list such as [a, b]"
    return "null" if hint is type(None) else NAMES.get(hint, str(hint))
