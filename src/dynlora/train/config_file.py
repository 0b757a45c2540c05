"""Write `config.yaml`: the resolved configuration in a run's folder, valid for `dynlora train`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dynlora.files.whole import write_text
from dynlora.train.config import JobConfig

PLACES = (("output",), ("model", "path"), ("data", "path"), ("lora", "start_from"))
"""Keys of paths, written as absolute because runs are used from other directories."""


def plain_values(config: JobConfig) -> dict[str, Any]:
    """Return the configuration as plain YAML and JSON values, with absolute paths."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))  # tuples become lists
    for *sections, key in PLACES:
        inside = values
        for section in sections:
            inside = inside[section]
        if inside[key] is not None:
            inside[key] = str(Path(inside[key]).absolute())
    return values


def write_config(path: Path, config: JobConfig) -> None:
    """Write the configuration, with `overwrite` and `training.resume` reset.

    With `overwrite: true`, `dynlora train` on this file would delete the run.
    """
    values = plain_values(config)
    values["overwrite"], values["training"]["resume"] = False, "none"
    write_text(path, yaml.safe_dump(values, sort_keys=False))
