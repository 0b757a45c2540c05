"""A run's folder: what lies where, and how it is written so that a crash leaves no half file."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dynlora.errors import ResumeError, RunFolderError
from dynlora.train.config import JobConfig

RESUMABLE = {"output", "overwrite", "training.resume"}
"""Keys that may differ between a run and the job that resumes it."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        """A stock PEFT adapter."""
        return self.root / "adapter"

    @property
    def full_model(self) -> Path:
        """The whole model and its tokenizer, with `method: full`."""
        return self.root / "model"

    @property
    def config(self) -> Path:
        """The resolved configuration; `dynlora train` takes it as it is."""
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        """Versions, seed, parameters, metrics and times."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """One line for each time the Trainer logged."""
        return self.root / "metrics.jsonl"

    @property
    def ranks(self) -> Path:
        """One line for each event, with `method: dynamic`."""
        return self.root / "ranks.jsonl"

    @property
    def heatmap(self) -> Path:
        """Ranks by layer and time, with `method: dynamic`."""
        return self.root / "ranks.png"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    def holds_run(self) -> bool:
        """Return whether a run was begun here."""
        return self.config.exists() or self.run.exists()

    def refuse_run(self) -> None:
        """Leave a run that is already here alone.

        Raises:
            RunFolderError: If the folder holds a run, or is not a folder.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunFolderError(f"`output` must be a folder, got the file {self.root}.")
        if self.holds_run():
            raise RunFolderError(
                f"`output` must be a folder without a run, got {self.root}, which holds one: give "
                "another `--output`, replace it with `--overwrite true`, or go on with it with "
                "`--training.resume latest`."
            )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder."""
        for path in (self.adapter, self.full_model, self.checkpoints):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.config, self.run, self.metrics, self.ranks, self.heatmap):
            path.unlink(missing_ok=True)

    def latest_checkpoint(self) -> Path:
        """Return the newest complete checkpoint.

        Raises:
            ResumeError: If there is none.
        """
        found = [path.parent for path in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        if not found:
            raise ResumeError(
                f"`training.resume: latest` needs a checkpoint in {self.checkpoints}, got none: "
                "leave `training.resume: none` to start afresh."
            )
        return max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file of lines; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_config(path: Path, config: JobConfig) -> None:
    """Write the resolved configuration as YAML that `dynlora train` takes back."""
    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists, which YAML has
    write_text(path, yaml.safe_dump(plain, sort_keys=False))


def check_same_config(checkpoint: Path, config: JobConfig) -> None:
    """Refuse to resume a run whose configuration was another.

    Args:
        checkpoint: Folder of a checkpoint inside a run's folder.
        config: The job that wants to go on from it.

    Raises:
        ResumeError: If the checkpoint is not there, its run's configuration is missing, or a key
            differs.
    """
    if not (checkpoint / "trainer_state.json").is_file():
        raise ResumeError(
            f"`training.resume` must be none, latest or the folder of a checkpoint, got "
            f"{checkpoint}, which has no trainer_state.json."
        )
    run = RunFolder(checkpoint.resolve().parent.parent)
    if not run.config.is_file():
        raise ResumeError(
            f"a checkpoint must lie in the folder of its run, got {checkpoint}: {run.config} is "
            "missing."
        )
    then = flatten(yaml.safe_load(run.config.read_text(encoding="utf-8")))
    now = flatten(json.loads(json.dumps(asdict(config))))
    keys = sorted((then.keys() | now.keys()) - RESUMABLE)
    differing = [
        f"{key} (was {then.get(key)}, now {now.get(key)})"
        for key in keys
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise ResumeError(
            f"a resumed run must have the configuration of its checkpoint {checkpoint}, but "
            f"{len(differing)} keys differ: {', '.join(differing)}. Use {run.config}."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat.update(nested if nested is not None else {f"{prefix}{key}": value})
    return flat
