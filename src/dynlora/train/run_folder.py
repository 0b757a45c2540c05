"""A run's folder: what lies where, and how it is written so that a crash leaves no half file."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dynlora.errors import RunFolderError
from dynlora.train.config import JobConfig


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
    def report(self) -> Path:
        """The page that `dynlora report` writes; an old one shall not outlive its run."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def tracking(self) -> Path:
        """What trackers write, a folder each, with `training.report_to`."""
        return self.root / "tracking"

    @property
    def _all(self) -> tuple[Path, ...]:
        """Everything that a run writes; `run.json`, which marks a run, comes last."""
        folders = (self.adapter, self.full_model, self.checkpoints, self.tracking)
        files = (self.config, self.metrics, self.ranks, self.heatmap, self.report, self.run)
        return (*folders, *files)

    def check_usable(self) -> None:
        """Check that the folder is one, or can become one, and holds nothing of the user's own.

        Raises:
            RunFolderError: If a file stands in its place, or a file or folder that is not a run's
                has a name that a run would write.
        """
        for path in (self.root, *self.root.parents):
            if path.exists() and not path.is_dir():
                raise RunFolderError(
                    f"`output` must be a folder, got {self.root}, but {path} is a file: give "
                    "another `--output`."
                )
        taken = [path.name for path in self._all if path.exists()]
        if taken and not self.run.exists():
            raise RunFolderError(
                f"`output` must be a folder in which a run can write {', '.join(taken)}, got "
                f"{self.root}, which holds that already, and no run.json to say that a run made "
                "it: give another `--output`."
            )

    def refuse_run(self) -> None:
        """Leave a run that is already here alone.

        Raises:
            RunFolderError: If the folder holds a run.
        """
        if self.run.exists():
            raise RunFolderError(
                f"`output` must be a folder without a run, got {self.root}, which holds one: give "
                "another `--output`, replace it with `--overwrite true`, or go on with it with "
                "`--training.resume latest`."
            )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder."""
        for path in self._all:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


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
    """Return the JSON objects of a file of lines; none if there is no file.

    A last line without its end was cut short when its process was killed, and is left out.
    """
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in whole]


def write_config(path: Path, config: JobConfig) -> None:
    """Write the resolved configuration as YAML that `dynlora train` takes back."""
    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists, which YAML has
    write_text(path, yaml.safe_dump(plain, sort_keys=False))
