"""Manifest of a folder: size and SHA-256 of its files, checked before use."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of each file in a folder tree, by relative path."""
    return {
        path.relative_to(folder).as_posix(): _figures(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damage(folder: Path, manifest: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the fault of the first file that differs from the manifest; None without a fault.

    Files outside the manifest are ignored.
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
