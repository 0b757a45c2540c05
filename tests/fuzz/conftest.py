"""Where files are read: in a process that each module starts once."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from tests.fuzz.limited_process import LimitedProcess, Read

Limit = Callable[..., LimitedProcess]


@pytest.fixture(scope="module")
def limited() -> Iterator[Limit]:
    """Return a function that makes limited processes, which end with the module."""
    with ExitStack() as stack:

        def start(read: Read, *warm: tuple[object, ...]) -> LimitedProcess:
            return stack.enter_context(closing(LimitedProcess(read, *warm)))

        yield start
