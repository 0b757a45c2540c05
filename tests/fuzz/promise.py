"""What a reader promises of any file: it is read, or refused in words that name it."""

import warnings
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

FEW, MANY = 300, 10_000
CASES = [
    pytest.param(FEW, id=f"{FEW} cases"),
    pytest.param(MANY, id=f"{MANY} cases", marks=[pytest.mark.slow, pytest.mark.timeout(3 * 3600)]),
]
"""Of each kind of file: the same few in every run of the default suite, others in each slow one."""


def check_cases(
    cases: int, files: st.SearchStrategy[bytes], check: Callable[[bytes], None]
) -> None:
    """Check a promise for many files.

    Args:
        cases: How many.
        files: What they hold.
        check: Takes a file's content, and raises what is wrong.
    """

    @settings(
        max_examples=cases,
        derandomize=cases == FEW,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def holds(content: bytes) -> None:
        check(content)

    with warnings.catch_warnings():
        # A file that fails is shown, however long it is.
        warnings.simplefilter("ignore", HypothesisWarning)
        holds()
