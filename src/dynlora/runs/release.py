"""Release of dynlora: its version and, in its own git checkout, the commit."""

import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
PLACE = "src/dynlora/"
"""Path of the package in its own checkout, which tells it from other projects' checkouts."""


def release(package: Path = PACKAGE) -> str:
    """Return the version; in a checkout with commit and `.dirty`, as `0.1.0+g0123456789ab.dirty`.

    Args:
        package: Folder of the package; only changes in it count as dirty.
    """
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
