"""Which dynlora this is: its version and, in a checkout of its own, the commit."""

import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent
PLACE = "src/dynlora/"
"""Where the package is in a checkout of its own; in one of somebody else's it is elsewhere."""


def release(package: Path = PACKAGE) -> str:
    """Return the version; in a checkout as `0.1.0+g0123456789ab`, and `.dirty` if it was changed.

    Args:
        package: Folder of the package; only changes in it count.
    """
    number = version("dynlora")
    if _git(package, "rev-parse", "--show-prefix") != PLACE:
        return number
    commit = _git(package, "rev-parse", "--short=12", "HEAD")
    changed = ".dirty" if _git(package, "status", "--porcelain", ".") else ""
    return f"{number}+g{commit}{changed}" if commit else number


def _git(folder: Path, *words: str) -> str:
    """Return what git prints; nothing where there is no git, or no checkout."""
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
