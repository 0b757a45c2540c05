"""Check GGUF files, and load them through transformers."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from transformers import GgufConfig

from dynlora.errors import ConfigError

MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Check that a file exists and begins with the GGUF magic bytes.

    Raises:
        ConfigError: If it does not.
    """
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in path.parent.glob("*.gguf"))) or "none"
        raise ConfigError(
            f"`model.gguf_file` must name a file in {path.parent}, got {path.name!r}, which is not "
            f"there: its GGUF files are: {found}."
        )
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise ConfigError(
            f"`model.gguf_file` must be in the GGUF format and so begin with {MAGIC!r}, got "
            f"{start!r} in {path}: download it again, or set `model.path` alone for a Hugging Face "
            "model."
        )


def restored() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that dequantize a GGUF file.

    Otherwise transformers keeps quantized blocks if it has a kernel for them; such a model can be
    neither trained nor saved.
    """
    return {"quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def no_bar() -> Iterator[None]:
    """Hide transformers' progress bar for GGUF files, which has no option."""
    with redirect_stderr(io.StringIO()):
        yield


def not_read(label: str, error: Exception) -> ConfigError:
    """Return the error for a GGUF file that transformers cannot read.

    Args:
        label: Path of the file.
        error: Error raised by transformers.
    """
    reason = " ".join(str(error).split()).rstrip(".")
    return ConfigError(
        f"{label} must be a whole GGUF file of an architecture that transformers can read, but "
        f"reading it failed with {type(error).__name__}: {reason}. Download it again if it was cut "
        "short; of another architecture use the model's Hugging Face folder."
    )
