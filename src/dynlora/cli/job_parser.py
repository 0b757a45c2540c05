"""Parse `CONFIG --dotted.key value ...` into a `JobConfig` with jsonargparse.

jsonargparse reads file, options and types. This module turns its errors into one line that names
the key and the nearest valid names.
"""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from dynlora.config import PRESET_TEXT, DynamicLoraConfig, PresetName, preset_values
from dynlora.errors import ConfigError
from dynlora.files.plain_values import parse_yaml
from dynlora.train.config import JobConfig

USAGES = {
    "train": "dynlora train CONFIG [--output DIR] [--dotted.key value ...] [--dry-run]",
    "plan": "dynlora plan CONFIG [--dotted.key value ...] [--measure]",
}
"""Usage of the verbs with a CONFIG."""
DRY_RUN, MEASURE = "--dry-run", "--measure"
FLAGS = {
    "train": {DRY_RUN: "load and check everything, and write nothing"},
    "plan": {MEASURE: "train each method for two steps and measure its peak memory"},
}
"""Options by verb, apart from configuration keys, with their help."""
DESCRIPTIONS = {
    "train": (
        "Train and evaluate as the YAML file CONFIG says. With --dry-run everything is loaded and "
        "checked, and nothing trained or written."
    ),
    "plan": (
        "Print the parameters that each method would train. With --measure each method is also "
        "trained for two steps in a child process, to measure its peak memory. Nothing is written."
    ),
}
KEYS = (
    " Each key below can stand in CONFIG (a dot is a level) or on the command line, which wins. "
    "null unsets a key that may be null."
)
SHOWN = 3
"""Maximum number of near names in an error."""
T = TypeVar("T")
PRESET = "dynamic.preset"
"""Key that selects default values and is not a field of `DynamicLoraConfig`."""
OWN_OPTIONS = ("help", "print_config")
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def parse_job(arguments: Sequence[str], verb: str = "train") -> JobConfig | None:
    """Return the job described on the command line; None after `--help` or `--print_config`.

    Args:
        arguments: Words after the verb on the command line.
        verb: A key of `USAGES`.

    Raises:
        ConfigError: If a key or value is unknown, missing or out of range.
    """
    given = list(arguments)
    content: Mapping[str, Any] = {}
    _check_options(given, verb)
    if given and not given[0].startswith("-"):
        content = _read_file(Path(given[0]))
        given.insert(0, "--config")
    elif not {"-h", "--help"} & set(given):
        raise ConfigError(f"CONFIG, a YAML file, must come first: {USAGES[verb]}")
    try:
        values = _parser(verb, _preset_of(content, given)).parse_args(given).as_dict()
    except argparse.ArgumentError as error:
        raise _explain(error, USAGES[verb]) from error
    except SystemExit:  # raised after --help and --print_config
        return None
    return _build_job(values)


def parse_values(values: Mapping[str, Any]) -> JobConfig:
    """Return the job described by plain nested values, as in a YAML file.

    Raises:
        ConfigError: If a key or value is unknown, missing or out of range.
    """
    check_keys(values, "")
    try:
        parsed = _parser("train", _preset_in(values)).parse_object(dict(values)).as_dict()
    except argparse.ArgumentError as error:
        raise _explain(error, USAGES["train"]) from error
    return _build_job(parsed)


def _build_job(values: Mapping[str, Any]) -> JobConfig:
    """Build the job from the values of all keys, preset values included."""
    chosen = {key: values[key] for key in get_type_hints(JobConfig)}
    del chosen["dynamic"]["preset"]
    _check_values(chosen, JobConfig, "")
    return build(JobConfig, chosen)


def _preset_of(content: Mapping[str, Any], given: Sequence[str]) -> str:
    """Return the preset named on the command line, else in the file."""
    found = _preset_in(content)
    for option, following in pairwise((*given, "")):
        key, equals, value = option.partition("=")
        if key == f"--{PRESET}":
            found = value if equals else following or found
    return found


def _preset_in(content: Mapping[str, Any]) -> str:
    """Return the preset named in a configuration, unchecked."""
    return str(content.get("dynamic", {}).get("preset", "default"))


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Check the keys in a part of a configuration, which may be incomplete.

    Args:
        content: Keys and values from a file.
        where: Their place, for messages, such as ` in study.yaml`.

    Raises:
        ConfigError: If a key is unknown, or a section does not contain keys.
    """
    _check_level(content, JobConfig, "", where)


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from plain, typed, nested values.

    Raises:
        ConfigError: If a value is out of range; the message names the key with its section.
    """
    hints = get_type_hints(kind)
    made = {
        key: _build_section(key, hints[key], value) if is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return kind(**made)


def _build_section(key: str, kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return build(kind, values)
    except ConfigError as error:
        raise _in_section(key, error) from error


def _in_section(key: str, error: ConfigError) -> ConfigError:
    """Return an error with a section prefixed to its key, which lacks the section's name."""
    return ConfigError(re.sub(r"^`(\w+)`", rf"`{key}.\1`", str(error)))


class _HelpFormatter(DefaultHelpFormatter):
    """Describes the values of a key in plain words instead of Python types."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        hint = dict(valid_keys()).get(action.dest)
        if get_origin(hint) is Literal:
            return None  # the help already lists the choices
        return None if hint is None else _describe(hint)


def _parser(verb: str, preset: str) -> ArgumentParser:
    """Return a verb's parser, with the preset's values as defaults."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"dynlora {verb}",
        usage=USAGES[verb],
        description=DESCRIPTIONS[verb] + KEYS,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    sections = dict(_sections())
    parser.add_class_arguments(JobConfig, skip=set(sections))
    for key, section in sections.items():
        title = f"{key}: {inspect.getdoc(section)}".partition("\n")[0].removesuffix(".")
        group = parser.add_argument_group(title)
        group.add_class_arguments(section, key, as_group=False)
        if key == "dynamic":
            group.add_argument(f"--{PRESET}", type=PresetName, default=preset, help=PRESET_TEXT)
    try:
        chosen = preset_values(preset)
    except ConfigError as error:
        raise _in_section("dynamic", error) from error
    parser.set_defaults({f"dynamic.{key}": value for key, value in chosen.items()})
    return parser


def _sections() -> Iterator[tuple[str, Any]]:
    for key, hint in get_type_hints(JobConfig).items():
        if is_dataclass(hint):
            yield key, hint


def valid_keys(kind: Any = JobConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all dotted keys of the configuration with their types, sections included."""
    if kind is DynamicLoraConfig:
        yield f"{prefix}preset", PresetName
    for key, hint in get_type_hints(kind).items():
        yield prefix + key, hint
        if is_dataclass(hint):
            yield from valid_keys(hint, f"{prefix}{key}.")


def _read_file(path: Path) -> Mapping[str, Any]:
    """Read a YAML file and check its keys."""
    if not path.is_file():
        raise ConfigError(f"CONFIG must be a YAML file, got {path}, which is not a file.")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"CONFIG must be a YAML file, got {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"CONFIG must hold keys and values, got {path} without any.")
    _check_level(content, JobConfig, "", f" in {path}")
    return content


def _check_level(content: Mapping[str, Any], kind: Any, prefix: str, where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if dotted == PRESET:
            continue
        if key not in hints:
            raise _unknown(dotted, where)
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                inside = ", ".join(field.name for field in fields(hints[key]))
                raise ConfigError(f"`{dotted}` must hold keys, got {value}{where}: {inside}.")
            _check_level(value, hints[key], f"{dotted}.", where)


def _check_values(values: Mapping[str, Any], kind: Any, prefix: str) -> None:
    """Refuse null, which jsonargparse accepts for every key, and NUL, which no path can contain.

    Raises:
        ConfigError: If a required key is null, or a text contains a NUL character.
    """
    for key, hint in get_type_hints(kind).items():
        value, name = values[key], f"`{prefix}{key}`"
        if is_dataclass(hint):
            _check_values(value, hint, f"{prefix}{key}.")
        elif value is None and type(None) not in get_args(hint):
            raise ConfigError(f"{name} must be {_describe(hint)}, got null.")
        elif isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{name} must be a text without NUL, got {value!r}: remove it.")


def _check_options(given: Sequence[str], verb: str) -> None:
    hints = dict(valid_keys())
    for option, following in pairwise((*given, "")):
        key, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or key in OWN_OPTIONS:
            continue
        if key not in hints:
            where = " on the command line"
            if flags := difflib.get_close_matches(option, FLAGS[verb], n=1, cutoff=0.8):
                raise ConfigError(
                    f"unknown key `{key}`{where}: the nearest valid option is `{flags[0]}`."
                )
            raise _unknown(key, where)
        if is_dataclass(hints[key]):
            inside = ", ".join(f"--{key}.{field.name}" for field in fields(hints[key]))
            raise ConfigError(f"`--{key}` must name a key of the section {key}: {inside}.")
        _check_untagged(key, value if equals else following)


def _check_untagged(key: str, value: str) -> None:
    """Refuse YAML type tags in a value, because jsonargparse may fail on them."""
    try:
        tags = [getattr(event, "tag", None) or "" for event in yaml.parse(value)]
    except yaml.YAMLError:
        return  # plain text
    if any(tag.startswith("tag:yaml.org,") for tag in tags):
        raise ConfigError(f"`{key}` must be a value without YAML's `!!` types, got {value!r}.")


def _unknown(key: str, where: str) -> ConfigError:
    """Return the error for an unknown key, with the nearest valid names."""
    valid = [name for name, _ in valid_keys()]
    section, _, leaf = key.rpartition(".")
    if key in valid:  # a dotted key in a file; the command line accepts it
        return ConfigError(
            f"unknown key `{key}`{where}: write it in its section, `{section}: {{{leaf}: ...}}`."
        )
    sections = {name.rpartition(".")[0] for name in valid}
    home = next(iter(difflib.get_close_matches(section, sections, n=1, cutoff=0.7)), "")
    inside = [name for name in valid if name.rpartition(".")[0] == home]
    # A one-letter key, such as `lora.r`, matches any name in its section that starts with it.
    near = [name for name in inside if _alike(leaf, name) or name == f"{home}.{leaf[:1]}"]
    # In other sections, a key of an existing section must match exactly.
    near = near or [
        name
        for name in valid
        if name.endswith(f".{leaf}") or (section not in sections - {""} and _alike(leaf, name))
    ]
    names = ", ".join(f"`{name}`" for name in (near[:SHOWN] or inside))
    advice = f"the nearest valid name is {names}" if near else f"valid names are {names}"
    return ConfigError(f"unknown key `{key}`{where}: {advice}.")


def _alike(given: str, name: str) -> bool:
    """Return whether `given` is likely a typo or abbreviation of a key's last part."""
    leaf = name.rpartition(".")[2]
    words = leaf.split("_")
    short = "".join(word[0] for word in words)
    close = difflib.SequenceMatcher(None, given, leaf).ratio() >= 0.7
    return close or given in words or (len(words) > 1 and given == short)


def _explain(error: argparse.ArgumentError, usage: str) -> ConfigError:
    """Return jsonargparse's error as a `ConfigError` in plain words."""
    text = str(error)
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Got|Given) value: (.*)", text)
    hint = dict(valid_keys()).get(key[1]) if key else None
    if key is None or value is None or hint is None:
        return _explain_other(text, usage)
    choices = [str(choice) for choice in _choices(hint)]
    near = difflib.get_close_matches(value[1], choices, n=1, cutoff=0.4)
    advice = f" The nearest valid value is {near[0]}." if near else ""
    if near and near[0] == value[1]:
        advice = f" Write it as a list: [{near[0]}]."
    if value[1] == "False" and "no" in choices:
        advice = " YAML takes a bare no for false: write 'no' in quotes."
    given = "null" if value[1] == "None" else value[1]
    return ConfigError(f"`{key[1]}` must be {_describe(hint)}, got {given}.{advice}")


def _explain_other(text: str, usage: str) -> ConfigError:
    """Return a `ConfigError` for an error without a key and value."""
    if found := re.search(r"required: (.*)", text):
        return ConfigError(f"`{found[1]}` must be given, in CONFIG or as --{found[1]}.")
    if found := re.search(r"unrecognized arguments: (.*)", text):
        return ConfigError(f"CONFIG must be followed by options only, got {found[1]}: {usage}")
    if found := re.search(r"argument (--\S+): expected one argument", text):
        hint = dict(valid_keys()).get(found[1].removeprefix("--"))
        words = [] if hint is None else key_words(hint)
        example = f": say, for example, `{found[1]} {words[0]}`" if words else ""
        return ConfigError(f"`{found[1]}` must be followed by a value, got none{example}.")
    return ConfigError(" ".join(text.split()))


def _choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def key_words(hint: Any) -> list[str]:
    """Return suggested words for a key on the command line; other values may be valid too."""
    parts = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    words = [str(word) for part in parts if get_origin(part) is Literal for word in get_args(part)]
    if bool in parts:
        words += ["true", "false"]
    return [*words, "null"] if words and type(None) in parts else words


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(hint) in {Union, UnionType}:
        return " or ".join(_describe(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        choices = [str(choice) for choice in _choices(hint)]
        return f"a list of {', '.join(choices)}" if choices else "a list such as [a, b]"
    return "null" if hint is type(None) else NAMES.get(hint, str(hint))
