"""Verbs with a CONFIG: each key of a job is an option, such as `--lora.r 4`."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import click
import yaml
from click.shell_completion import CompletionItem

from dynlora.cli.arguments import FILE, Verb, flag
from dynlora.cli.output import Output
from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig
from dynlora.train.config.keys import describe, sections, settings, unknown_key, words
from dynlora.train.config_file import read_job

PATHS = {
    "output": "dir",
    "model.path": "dir",
    "data.path": "file",
    "lora.start_from": "dir",
    "training.resume": "dir",
}
"""Keys whose values the shell completes as paths."""
KEYS = (
    "Every key below can be set in CONFIG, a YAML file, where a dot is a level, or on the command "
    "line, which wins. null unsets a key that may be null."
)
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
"""On a CPU torch generates kernels per shape and keeps 1,024. Combinations of rank and batch length
exceed this number, and generating kernels again slows every step."""

JobRun = Callable[[JobConfig, Any, Output], None]  # runs a verb on its job and parsed arguments


class JobVerb(Verb):
    """A verb with a CONFIG and all keys of a job as options."""

    def __init__(self, name: str, summary: str, run: JobRun, flags: Sequence[click.Option]) -> None:
        """Create the verb; `flags` are options apart from the keys."""

        def run_job(given: Any, output: Output) -> None:
            config = job_of(given, output)
            if config is not None:
                os.environ.setdefault(*KERNELS)  # read when torch is loaded, by children too
                run(config, given, output)

        config = click.Argument(["config"], type=FILE, metavar="CONFIG", help="YAML file of a job")
        printed = flag("--print_config", "Print the resolved configuration and exit.")
        self.flags = (*flags, printed)
        self.keys = {key: _option(key) for key in settings()}
        super().__init__(name, summary, run_job, [config, *self.flags, *self.keys.values()])
        self.help = f"{self.help} {KEYS}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words; raise `ConfigError` with the nearest key of an unknown one."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            key, near = error.option_name.removeprefix("--"), {*(error.possibilities or ())}
            if key in sections():
                inside = ", ".join(f"--{key}.{name}" for name in sections()[key]["properties"])
                raise ConfigError(f"`--{key}` must name a key of the section: {inside}.") from None
            if near & {flag.opts[0] for flag in self.flags}:
                raise
            raise unknown_key(key, "on the command line") from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section."""
        keys = {"Job": [key for key in self.keys if "." not in key]}
        for name, section in sections().items():
            title = section["description"].partition(". ")[0].removesuffix(".")
            keys[f"{name}: {title}"] = [key for key in self.keys if key.startswith(f"{name}.")]
        own = [param for param in self.params if param not in self.keys.values()]
        groups: dict[str, list[click.Parameter]] = {"Options": own[1:]}  # CONFIG is an argument
        groups |= {title: [self.keys[key] for key in inside] for title, inside in keys.items()}
        for title, options in groups.items():
            with formatter.section(title):
                formatter.write_dl([option.get_help_record(ctx) or ("", "") for option in options])


def _option(key: str) -> click.Option:
    schema = settings()[key]

    def complete(_: Any, __: Any, incomplete: str) -> list[CompletionItem]:
        if key in PATHS:
            return [CompletionItem(incomplete, type=PATHS[key])]
        return [CompletionItem(word) for word in words(schema) if word.startswith(incomplete)]

    default = f"default: {json.dumps(schema['default'])}" if "default" in schema else "required"
    return click.Option(
        [f"--{key}", _name(key)],
        metavar="VALUE",
        help=f"{schema['description']} ({describe(schema)}; {default})",
        shell_complete=complete,
    )


def _name(key: str) -> str:
    """Return the attribute of a key in parsed arguments."""
    return key.replace(".", "__")


def given_keys(given: Any) -> dict[str, str]:
    """Return the texts of the keys on the command line."""
    texts = {key: vars(given)[_name(key)] for key in settings()}
    return {key: text for key, text in texts.items() if text is not None}


def job_of(given: Any, output: Output) -> JobConfig | None:
    """Return the job of a `JobVerb`; print it and return None with `--print_config`."""
    config = read_job(given.config, given_keys(given))
    if config.task == "causal_lm":
        from dynlora.train.data.splits import find_columns

        config = replace(config, data=find_columns(config.data))
    if not given.print_config:
        return config
    values = json.loads(json.dumps(asdict(config)))  # tuples become lists
    output.write(yaml.safe_dump(values, sort_keys=False).rstrip(), values)
    return None
