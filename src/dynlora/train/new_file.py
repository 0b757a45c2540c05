"""Write the file of a command's `--output`, without replacing files unasked."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynlora.errors import ConfigError
from dynlora.files import whole


def check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Check that `output` can be written.

    Raises:
        ConfigError: If it is a folder, or an existing file without `overwrite`.
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
    """Yield a draft file that becomes `output` if the block raises nothing.

    Raises:
        ConfigError: If the disk fails.
    """
    try:
        with whole.whole_file(output) as draft:
            yield draft
    except OSError as error:
        raise ConfigError(f"`--output` {output} could not be written: {error}.") from error
