"""`CONFIG --dotted.key value ...` to a `JobConfig`, with jsonargparse.

jsonargparse reads the file, the options and their types. What stands here turns its complaints
into one line that names the key and the nearest valid name.
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
"""By verb that takes a CONFIG."""
DRY_RUN, MEASURE = "--dry-run", "--measure"
FLAGS = {
    "train": {DRY_RUN: "load and check everything, and write nothing"},
    "plan": {MEASURE: "train each method for two steps and measure its peak memory"},
}
"""By verb its options that are no key, with the help of each."""
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
"""Valid names that an error shows where some are near."""
T = TypeVar("T")
PRESET = "dynamic.preset"
"""The one key that is no value of its own: it says which values those not given have."""
OWN_OPTIONS = ("help", "print_config")
NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def parse_job(arguments: Sequence[str], verb: str = "train") -> JobConfig | None:
    """Return the job that the command line describes; None after `--help` or `--print_config`.

    Args:
        arguments: What follows the verb on the command line.
        verb: A key of `USAGES`.

    Raises:
        ConfigError: If a key or value is unknown, missing or outside its range.
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
    except SystemExit:  # how argparse ends after --help and --print_config
        return None
    return _build_job(values)


def parse_values(values: Mapping[str, Any]) -> JobConfig:
    """Return the job that plain nested values describe, as a YAML file would.

    Raises:
        ConfigError: If a key or value is unknown, missing or outside its range.
    """
    check_keys(values, "")
    try:
        parsed = _parser("train", _preset_in(values)).parse_object(dict(values)).as_dict()
    except argparse.ArgumentError as error:
        raise _explain(error, USAGES["train"]) from error
    return _build_job(parsed)


def _build_job(values: Mapping[str, Any]) -> JobConfig:
    """Return the job of all keys' values; what a preset has given is among them."""
    chosen = {key: values[key] for key in get_type_hints(JobConfig)}
    del chosen["dynamic"]["preset"]
    _check_values(chosen, JobConfig, "")
    return build(JobConfig, chosen)


def _preset_of(content: Mapping[str, Any], given: Sequence[str]) -> str:
    """Return the preset that the file or, before it, the command line names."""
    found = _preset_in(content)
    for option, following in pairwise((*given, "")):
        key, equals, value = option.partition("=")
        if key == f"--{PRESET}":
            found = value if equals else following or found
    return found


def _preset_in(content: Mapping[str, Any]) -> str:
    """Return what a configuration names as its preset, whatever that is: it is checked later."""
    return str(content.get("dynamic", {}).get("preset", "default"))


def check_keys(content: Mapping[str, Any], where: str) -> None:
    """Check the keys of a part of a configuration, in which others may be missing.

    Args:
        content: Keys and values as they stand in a file.
        where: Where they stand, for messages, such as ` in study.yaml`.

    Raises:
        ConfigError: If a key is unknown, or a section holds no keys.
    """
    _check_level(content, JobConfig, "", where)


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return the dataclass `kind` made from plain, already typed, nested values.

    Raises:
        ConfigError: If a value is outside its range; the key is named with its section.
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
    """Return an error with its key in a section: `DynamicLoraConfig` does not know of its own."""
    return ConfigError(re.sub(r"^`(\w+)`", rf"`{key}.\1`", str(error)))


class _HelpFormatter(DefaultHelpFormatter):
    """Says in our words, and not in Python's, what a key takes."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        hint = dict(valid_keys()).get(action.dest)
        if get_origin(hint) is Literal:
            return None  # the choices stand beside the key
        return None if hint is None else _describe(hint)


def _parser(verb: str, preset: str) -> ArgumentParser:
    """Return a verb's parser, in which what is not given has the preset's value."""
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
    """Yield every dotted key of the configuration with its type; sections have keys too."""
    if kind is DynamicLoraConfig:
        yield f"{prefix}preset", PresetName
    for key, hint in get_type_hints(kind).items():
        yield prefix + key, hint
        if is_dataclass(hint):
            yield from valid_keys(hint, f"{prefix}{key}.")


def _read_file(path: Path) -> Mapping[str, Any]:
    """Return what the file holds, if it is there, is YAML, and has no unknown key."""
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
    """Check for null, which jsonargparse accepts for every key, and for NUL, which no path has.

    Raises:
        ConfigError: If a key that must be set is null, or a text contains a NUL character.
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
    """Check that a value asks YAML for no type of its own, on which jsonargparse may break."""
    try:
        tags = [getattr(event, "tag", None) or "" for event in yaml.parse(value)]
    except yaml.YAMLError:
        return  # a text, whatever is in it
    if any(tag.startswith("tag:yaml.org,") for tag in tags):
        raise ConfigError(f"`{key}` must be a value without YAML's `!!` types, got {value!r}.")


def _unknown(key: str, where: str) -> ConfigError:
    """Return the error for a key that does not exist, with the names that come nearest."""
    valid = [name for name, _ in valid_keys()]
    section, _, leaf = key.rpartition(".")
    if key in valid:  # in a file: on the command line it would have been taken
        return ConfigError(
            f"unknown key `{key}`{where}: write it in its section, `{section}: {{{leaf}: ...}}`."
        )
    sections = {name.rpartition(".")[0] for name in valid}
    home = next(iter(difflib.get_close_matches(section, sections, n=1, cutoff=0.7)), "")
    inside = [name for name in valid if name.rpartition(".")[0] == home]
    # A key of one letter, as `lora.r`, is meant by what begins with it, in its own section only.
    near = [name for name in inside if _alike(leaf, name) or name == f"{home}.{leaf[:1]}"]
    # A key of a section that exists is looked for elsewhere only under its very name.
    near = near or [
        name
        for name in valid
        if name.endswith(f".{leaf}") or (section not in sections - {""} and _alike(leaf, name))
    ]
    names = ", ".join(f"`{name}`" for name in (near[:SHOWN] or inside))
    advice = f"the nearest valid name is {names}" if near else f"valid names are {names}"
    return ConfigError(f"unknown key `{key}`{where}: {advice}.")


def _alike(given: str, name: str) -> bool:
    """Return whether `given` is likely a slip or a short form of a key's last part."""
    leaf = name.rpartition(".")[2]
    words = leaf.split("_")
    short = "".join(word[0] for word in words)
    close = difflib.SequenceMatcher(None, given, leaf).ratio() >= 0.7
    return close or given in words or (len(words) > 1 and given == short)


def _explain(error: argparse.ArgumentError, usage: str) -> ConfigError:
    """Return jsonargparse's complaint in our words; in its own where it is none about a value."""
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
    """Return a complaint that is not about a value."""
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
    """Return the words worth offering for a key on the command line; others may do too."""
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
