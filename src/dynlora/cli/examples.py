"""`dynlora examples [NAME]`: list the example jobs, or copy one with its data."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import yaml
from rich.text import Text

from dynlora.cli.arguments import FILE, Verb, option
from dynlora.cli.output import Output
from dynlora.errors import ConfigError
from dynlora.files.whole import write_text

FOLDERS = [Path(__file__).parents[level] / "examples" for level in (1, 3)]  # or of a checkout


def _run(given: Any, output: Output) -> None:
    folder = next(path for path in FOLDERS if path.is_dir())
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.yaml"))}
    if given.name is None:
        words = {name: " ".join(text.replace("#", "").split()) for name, text in texts.items()}
        first = {name: comment.partition(". ")[0] for name, comment in words.items()}
        output.show(Text("\n".join(f"{name}: {purpose}" for name, purpose in first.items())), first)
        return
    if given.name not in texts:
        raise ConfigError(f"NAME must be one of {', '.join(texts)}, but got {given.name}.")
    target, text = given.output or Path(f"{given.name}.yaml"), texts[given.name]
    data = Path(yaml.safe_load(text)["data"].get("path") or folder)
    own = [data] if folder in (folder.parent / data).parents else []
    for path in (target, *own):
        if path.exists():
            raise ConfigError(f"NAME must be copied to new places, but got {path}, which exists.")
    for path in own:
        shutil.copytree(folder.parent / path, path)
    write_text(target, text)
    output.show(
        Text(f"{target}\nnext: dynlora train {shlex.quote(str(target))}"), {"output": str(target)}
    )


COMMAND = Verb(
    "examples",
    "list the example jobs, or copy one with its data",
    _run,
    [
        click.Argument(["name"], metavar="[NAME]", required=False),
        option("--output FILE", "Default: NAME.yaml.", FILE),
    ],
)
