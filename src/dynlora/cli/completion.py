"""`dynlora completion SHELL`: print a shell's completion script for all verbs and options.

Each verb's module has a `make_parser()`, which also parses its arguments. For verbs with a CONFIG,
which jsonargparse parses, options are listed here from the configuration.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import shtab

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.job_parser import FLAGS, key_words, valid_keys
from dynlora.cli.output import Output
from dynlora.cli.schema import describe
from dynlora.cli.verbs import VERBS
from dynlora.train.config import JobConfig

SHELLS = ("bash", "zsh", "tcsh")
SWITCHES = {
    "--json": "print the result as one JSON object",
    "--quiet": "print nothing but errors, and the result with --json",
}
"""Options of every verb, with their help."""
PATH_KEYS = {
    "output": shtab.DIRECTORY,
    "model.path": shtab.DIRECTORY,
    "data.path": shtab.FILE,
    "lora.start_from": shtab.DIRECTORY,
    "training.resume": shtab.DIRECTORY,
}
"""Keys whose values are completed from the file system."""
FOLDERS = ("DIR", "RUN", "ADAPTER", "A", "B", "C")
"""Metavars of arguments that are folders."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `completion` on the command line.
        output: Prints the script, even with `--quiet`.

    Raises:
        ConfigError: If the shell is unknown.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return
    script = shtab.complete(command_parser(), given.shell)
    output.write(script, {"shell": given.shell, "script": script})


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("completion")
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    return parser


def command_parser() -> argparse.ArgumentParser:
    """Return a parser of the whole command line, used only to generate the script."""
    root = argparse.ArgumentParser(prog="dynlora", description="Fine-tune with dynamic LoRA ranks.")
    root.add_argument("--version", action="store_true", help="show version and environment")
    _add_switches(root, SWITCHES)
    verbs = root.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in VERBS.items():
        parser = _parser_of(name)
        _add_switches(parser, SWITCHES)
        for action in parser._actions:
            _complete_path(action)
        verbs.add_parser(
            name, help=verb.summary, description=verb.summary, parents=[parser], add_help=False
        )
    return root


def _parser_of(verb: str) -> argparse.ArgumentParser:
    if verb in FLAGS:
        return _config_parser(verb)
    parser: argparse.ArgumentParser = import_module(f"dynlora.cli.{verb}").make_parser()
    return parser


def _add_switches(parser: argparse.ArgumentParser, switches: Mapping[str, str]) -> None:
    for name, text in switches.items():
        parser.add_argument(name, action="store_true", help=text)


def _complete_path(action: argparse.Action) -> None:
    """Complete a path argument from the file system."""
    if action.type is Path:
        is_folder = action.metavar in FOLDERS
        action.complete = shtab.DIRECTORY if is_folder else shtab.FILE  # type: ignore[attr-defined]


def _config_parser(verb: str) -> argparse.ArgumentParser:
    """Return a parser with all configuration keys as options."""
    parser = verb_parser(verb)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the job")
    _add_switches(parser, FLAGS[verb])
    texts = dict(_descriptions(JobConfig))
    for key, hint in valid_keys():
        if is_dataclass(hint):
            continue
        text = texts[key].replace("%", "%%")
        words = key_words(hint) or None
        action = parser.add_argument(f"--{key}", metavar="VALUE", help=text, choices=words)
        if key in PATH_KEYS:
            action.complete = PATH_KEYS[key]  # type: ignore[attr-defined]
    return parser


def _descriptions(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, hint in valid_keys(kind):
        if "." in name:
            continue
        yield f"{prefix}{name}", describe(kind)[name]
        if is_dataclass(hint):
            yield from _descriptions(hint, f"{prefix}{name}.")
