"""`run.json` and `config.yaml` of a run: write the record, read both as checked values."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError
from dynlora.files.json_files import check_format, read_json, read_object, stamp, write_json
from dynlora.files.plain_values import parse_yaml

FORMAT = 1  # format of `run.json` and of the other files of a run's folder
PACKAGE = Path(__file__).parents[1]
PLACE = "src/dynlora/"  # path of the package in its own repository, not in another project's
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
UNFINISHED = {
    "running": "is still running, or was killed before it could say so",
    "interrupted": "was stopped by its user",
    "failed": "ended with an error",
}
"""Description of each status except `finished`."""
_NUMBERS = dict[str, float | None]
_KINDS: Mapping[str, Any] = {
    "method": str,
    "seed": int | None,
    "steps": int | None,
    "budget": int | None,
    "processes": int,
    "engine": str | None,
    "num_labels": int | None,
    "class_names": list[str] | None,
    "rows": _NUMBERS,
    "metrics_before": _NUMBERS,
    "metrics_after": _NUMBERS,
    "parameters": _NUMBERS,
    "seconds": _NUMBERS,
    "adapter_start_seconds": float,
    "peak_memory_bytes": int | None,
    "peak_gpu_memory_bytes": int | None,
    "best_step": int | None,
    "final_ranks": dict[str, int],
    "planned_steps": int,
    "planned_events": list[int],
    "resumed_from_step": int | None,
}
"""Values of `run.json` that are read; each may be missing."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The values of `run.json`, and its path."""

    path: Path
    values: dict[str, Any] = field(default_factory=lambda: dict(stamp(FORMAT)))

    def update(self, **values: Any) -> None:
        """Set values, and rewrite the file with the current time."""
        self.values.update(values, written=datetime.now(UTC).isoformat(timespec="seconds"))
        write_json(self.path, self.values)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's result."""
    packages = {package: installed(package) for package in PACKAGES}
    return {"python": platform.python_version(), "dynlora": release(), **packages}


def installed(package: str) -> str:
    """Return the version of a package, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def release(package: Path = PACKAGE) -> str:
    """Return the version; in a checkout, as `0.1.0+g0123456789ab.dirty`."""
    number = version("dynlora")
    if _git(package, "rev-parse", "--show-prefix") != PLACE:
        return number
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    changed = ".dirty" if _git(package, "status", "--porcelain", ".") else ""
    return f"{number}+g{commit}{changed}" if commit else number


def _git(folder: Path, *words: str) -> str:
    """Return git's output; empty without git or a checkout."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def check_kind(value: object, kind: Any, name: str) -> Any:
    """Return a value from a file as an object of a type, with finite numbers only.

    Raises `ValueError` for other values.
    """
    # Slow, and only commands that read runs need it.
    from pydantic_core import ValidationError, to_json

    try:
        return _validator(kind).validate_json(to_json([value]))[0]
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f".{part}" for part in fault["loc"][1:])
        raise ValueError(
            f"`{name}{place}` is wrong: {fault['msg']}, got {str(fault['input'])[:60]!r}"
        ) from error


@cache
def _validator(kind: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    settings = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    # In a list, because pydantic accepts no settings for a bare dataclass.
    return TypeAdapter(list[kind], config=settings)


def read_record(path: Path) -> dict[str, Any]:
    """Return the values of `run.json`; raise `RunFileError` if one is of a wrong kind or format."""
    values = read_json(path)
    check_format(path, values, FORMAT, RunFileError)
    try:
        for key, kind in _KINDS.items():
            if key in values:
                check_kind(values[key], kind, key)
        if not all(rank >= 0 for rank in values.get("final_ranks", {}).values()):
            raise ValueError("`final_ranks` must hold ranks of at least 0")
        status, known = values.get("status"), ["finished", *UNFINISHED]
        if status not in known:
            given = str(status)[:60]
            raise ValueError(f"`status` must be one of {', '.join(known)}, got {given!r}")
    except ValueError as error:
        raise wrong_record(path, str(error)) from error
    return values


def wrong_record(path: Path, fault: str) -> RunFileError:
    """Return the error for a fault in `run.json`."""
    return RunFileError(
        f"{path} must be as `dynlora train` writes it, but {fault[:300]}: restore the file from a "
        "copy, or train again."
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in `config.yaml`; raise `RunFileError` if there is none."""
    return read_object(path, parse_yaml, "the YAML of a run's configuration")
