"""Files from anywhere: whatever they contain, they are used, or refused in words that name them."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.limited_process import LimitedProcess
from tests.fuzz.reading import read
from tests.fuzz.targets import TARGETS, make_files

FEW, MANY = 50, 10_000


LONG = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a good file of every target."""
    return make_files(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[LimitedProcess]:
    """Return the process, which has read every good file."""
    warm = [target.order(folder) for target in TARGETS.values()]
    with closing(LimitedProcess(read, *warm)) as started:
        yield started


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=LONG)])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_a_changed_file_is_used_or_refused_by_name(
    process: LimitedProcess, folder: Path, name: str, cases: int
) -> None:
    target, path = TARGETS[name], folder / name
    good = path.read_bytes()

    # The same few files in every run of the default suite, others in each slow one.
    @settings(
        max_examples=cases,
        derandomize=cases == FEW,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.change(good))
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        errors = process.read(*target.order(folder))
        assert all(names(error, target.read, path) for error in errors), errors

    try:
        holds()
    finally:
        path.write_bytes(good)


def names(error: str, reader: str, path: Path) -> bool:
    """Return whether an error names the faulty file."""
    match reader:
        case "use_adapter":
            return str(path.parent) in error
        case "use_run":
            return path.name in error
        case "read_job" | "read_study" if error.count("`") >= 2:
            return True  # a value is named by its key: it may come from the command line
    return str(path) in error
