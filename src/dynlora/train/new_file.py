"""The new file of a verb's `--output`, never in the place of one that must not be lost."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynlora.errors import ConfigError
from dynlora.files import whole


def check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Check that a file can come to lie at `output`.

    Raises:
        ConfigError: If no file is there but a folder, or a file that may not be replaced.
    """
    whole.check_replaceable(
        output,
        lambda _: overwrite,
        required="a new file",
        otherwise="a file that exists: give another, or --overwrite to replace it.",
        error=ConfigError,
    )


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Give a file to write, which becomes `output` if nothing is raised.

    Raises:
        ConfigError: If the disk refuses.
    """
    try:
        with whole.whole_file(output) as draft:
            yield draft
    except OSError as error:
        raise ConfigError(f"`--output` {output} could not be written: {error}.") from error
