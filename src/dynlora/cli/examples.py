"""`dynlora examples [NAME]`: list the example jobs, or copy one with its data."""

import shutil
from pathlib import Path
from typing import Any

import click
import yaml
from rich.table import Table
from rich.text import Text

from dynlora.cli.arguments import FILE, Verb
from dynlora.cli.output import Output
from dynlora.errors import ConfigError
from dynlora.files.whole import whole_file

HERE = Path(__file__).parents[1]
FOLDERS = (HERE / "examples", HERE.parents[1] / "examples")
"""Folders of examples: in an installed package, and in a checkout."""


def _run(given: Any, output: Output) -> None:
    folder = next(path for path in FOLDERS if path.is_dir())
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if given.name is None:
        purposes = {name: _purpose(path) for name, path in found.items()}
        table = Table("example", "purpose")
        for name, purpose in purposes.items():
            table.add_row(name, Text(purpose))
        output.show(table, purposes)
        return
    if given.name not in found:
        raise ConfigError(f"NAME must be one of {', '.join(found)}, but got {given.name}.")
    target = given.output or Path(f"{given.name}.yaml")
    text = found[given.name].read_text(encoding="utf-8")
    data = Path(yaml.safe_load(text)["data"].get("path") or folder)
    own = [data] if folder in (folder.parent / data).parents else []
    for path in (target, *own):
        if path.exists():
            raise ConfigError(f"NAME must be copied to new places, but got {path}, which exists.")
    with whole_file(target) as draft:
        draft.write_text(text, encoding="utf-8")
        for path in own:
            shutil.copytree(folder.parent / path, path)
    output.show(Text(f"{target}\nnext: dynlora train {target}"), {"output": str(target)})


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.strip("# ") for line in lines if line.startswith("#"))
    return comment.partition(". ")[0]


COMMAND = Verb(
    "examples",
    "list the example jobs, or copy one with its data",
    _run,
    [
        click.Argument(["name"], metavar="[NAME]", required=False),
        click.Option(
            ["--output"], type=FILE, metavar="FILE", help="A new file (default: NAME.yaml)."
        ),
    ],
)
