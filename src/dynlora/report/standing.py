"""How far a run has come and what follows, from its record and its newest log entries."""

import math
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora.errors import DynamicLoraError
from dynlora.files.plain_values import parse_json
from dynlora.report import wording
from dynlora.runs.checkpoints import way_on
from dynlora.runs.folder import RunFolder
from dynlora.runs.reader import run_facts
from dynlora.runs.record import UNFINISHED, read_config

TAIL = 2**14  # bytes of the newest log entries
QUIET = 5.0  # seconds without a change after which a run without its lock counts as killed
REGULAR = {"eval": "evaluation", "save": "checkpoint"}  # by key of the configuration
KILLED = "was killed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a run has come."""

    name: str
    status: str  # of `run.json`, or `killed` or `unreadable`
    error: str = ""  # why the run failed or cannot be read
    step: int = 0
    planned: int | None = None  # optimizer steps of the whole run
    pace: float | None = None  # seconds per step, evaluations included, if the run goes on
    newest: Mapping[str, Any] = field(default_factory=dict)  # last value by logged key
    facts: Mapping[str, Any] = field(default_factory=dict)  # values of `run.json`
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """The last training loss that was logged."""
        loss = self.newest.get("loss")
        return loss if isinstance(loss, int | float) else None

    @property
    def left(self) -> float | None:
        """Seconds to the last planned step; None if unknown."""
        return None if self.planned is None else self.until(self.planned)

    def until(self, step: float) -> float | None:
        """Return the seconds to a step; None if unknown."""
        return None if self.pace is None else self.pace * max(0.0, step - self.step)

    def texts(self) -> dict[str, str]:
        """Return progress, loss and memory as texts by label."""
        told = {"step": wording.count_text(self.step)}
        if self.planned:
            told["step"] += f" of {self.planned:,} ({self.step / self.planned:.0%})"
        if self.left is not None:
            told["to the end"] = f"about {wording.seconds_text(self.left)}"
        if self.pace:
            told["time per step"] = wording.seconds_text(self.pace)
        if self.loss is not None:
            told["training loss"] = wording.metric_text(self.loss)
        for key, label in (("memory", "peak memory"), ("gpu_memory", "peak GPU memory")):
            size = self.newest.get(f"peak_{key}_bytes")
            if isinstance(size, int):
                told[label] = wording.bytes_text(size)
        return told


class Watched:
    """A run whose record and newest log entries are read when its files change."""

    def __init__(self, root: Path) -> None:
        """Raise `RunFileError` if the folder is not a run's."""
        self.folder = RunFolder(root)
        self.marks: tuple[object, ...] = ()
        """Identity, size and time of each file, and whether the run was killed."""
        self.standing = _standing(self.folder, killed=False)

    def look(self) -> None:
        """Update `marks`, and `standing` if a file changed."""
        folder = self.folder
        files = (folder.run, folder.config, folder.metrics, folder.ranks)
        states = [path.stat() if path.exists() else None for path in files]
        marks = tuple(s and (s.st_ino, s.st_size, s.st_mtime_ns) for s in states)
        killed = marks == self.marks[:-1] and bool(self.marks[-1])
        if self.standing.status == "running" and not killed:
            newest = max((state.st_mtime for state in states if state), default=0.0)
            killed = time.time() - newest > QUIET and not folder.is_in_use()
        if (*marks, killed) == self.marks:
            return
        self.marks = (*marks, killed)
        try:
            self.standing = _standing(folder, killed)
        except (DynamicLoraError, OSError) as error:
            name = self.standing.name
            self.standing = Standing(name=name, status="unreadable", error=str(error))


def _standing(folder: RunFolder, killed: bool) -> Standing:
    facts, lines = run_facts(folder), _newest_lines(folder.metrics)
    first = facts.get("resumed_from_step") or 0
    step = facts.get("steps") or max((line["step"] for line in lines), default=first)
    running, pace = facts["status"] == "running", None
    if running and not killed and step > first:
        spent = folder.metrics.stat().st_mtime - folder.run.stat().st_mtime
        pace = max(0.0, spent) / (step - first)
    return Standing(
        name=folder.root.resolve().name,
        status="killed" if running and killed else facts["status"],
        error=str(facts.get("error", "")),
        step=step,
        planned=facts.get("planned_steps"),
        pace=pace,
        newest={key: value for line in lines for key, value in line.items()},
        facts=facts,
        config=read_config(folder.config),
    )


def _newest_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete log entries in the last `TAIL` bytes of a file, which may be missing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL)
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").split("\n")
    found = []
    for line in lines[1 if start else 0 : -1]:
        try:
            values = parse_json(line)
        except ValueError:
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            found.append(values)
    return found


def upcoming(standing: Standing, folder: RunFolder) -> Iterator[str]:
    """Yield sentences about the next steps of a run, or of its user."""
    status, facts = standing.status, standing.facts
    if status == "unreadable":
        yield standing.error
    elif status == "finished":
        yield f"The run is finished: `dynlora report {shlex.quote(str(folder.root))}`."
    elif status != "running":
        why = f": {standing.error}" if standing.error else ""
        yield f"The run {UNFINISHED.get(status, KILLED)}{why}."
        launched = facts.get("processes", 1), facts.get("engine")
        advice = way_on(folder.root, facts.get("method", "unknown"), *launched)
        yield f"{advice[0].upper()}{advice[1:]}."
    else:
        for name, step in _next_steps(standing):
            left = standing.until(step)
            about = "" if left is None else f", in about {wording.seconds_text(left)}"
            yield f"{name}: step {step:,}{about}."


def _next_steps(standing: Standing) -> Iterator[tuple[str, int]]:
    """Yield the next step of each kind, the soonest first."""
    step, planned = standing.step, standing.planned
    found = [("Next event", each) for each in standing.facts.get("planned_events", ())]
    if planned is not None:
        found += [("Last step", planned)]
    training = standing.config.get("training", {})
    for key, name in REGULAR.items():
        apart = _steps_between(training, key, planned)
        if apart:
            following = math.ceil(apart * (math.floor(step / apart + 1e-9) + 1) - 1e-9)
            found += [(f"Next {name}", min(following, planned or following))]
    soonest = {name: at for name, at in sorted(found, key=lambda each: -each[1]) if at > step}
    return iter(sorted(soonest.items(), key=lambda each: each[1]))


def _steps_between(training: Any, key: str, planned: int | None) -> float | None:
    """Return the steps between evaluations or checkpoints; None if unknown or without any."""
    if not isinstance(training, Mapping):
        return None
    how, apart, epochs = (training.get(name) for name in (key, f"{key}_steps", "epochs"))
    if how == "steps" and isinstance(apart, int) and apart > 0:
        return apart
    known = training.get("max_steps") is None and isinstance(epochs, int | float) and epochs > 0
    return planned / epochs if how == "epoch" and planned and known else None
