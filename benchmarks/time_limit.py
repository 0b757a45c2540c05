"""A time limit of a process whose work continues in the next one."""

import time

TIME_UP = 2
"""Exit code of a process whose time was up before its work was done."""


class TimeUpError(Exception):
    """The time is up."""


class TimeLimit:
    """Minutes from now."""

    def __init__(self, minutes: float) -> None:
        """Start the clock."""
        self._end = time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Check that time is left.

        Raises:
            TimeUpError: If the time is up.
        """
        if time.monotonic() > self._end:
            raise TimeUpError
