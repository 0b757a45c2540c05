"""What files a folder holds, to the last bit: written when all are there, checked before use."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return length in bytes and SHA-256 of each file in a folder and below, by relative path."""
    return {
        path.relative_to(folder).as_posix(): _figures(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(folder: Path, manifest: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return what is wrong with the first file that is not as the manifest says; None if all are.

    Files that it does not name are not looked at.
    """
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        try:
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _figures(path) != expected:
                return f"{path} has other content than was written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _figures(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
