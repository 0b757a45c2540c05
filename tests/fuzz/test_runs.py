"""Files of a run's folder, as `dynlora report` and `dynlora compare` read them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.adapters import save_adapter
from tests.fuzz.conftest import Limit
from tests.fuzz.limited_process import LimitedProcess
from tests.fuzz.mutations import mutated_json, mutated_lines, mutated_safetensors, mutated_yaml
from tests.fuzz.promise import CASES, check_cases
from tests.fuzz.reading import use_run
from tests.unit.report.runs import block_names, make_events, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run whose ranks moved at three events."""
    events = make_events(block_names(1), [10, 40, 70])
    return write_run(tmp_path_factory.mktemp("runs") / "run", events=events)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run whose ranks are known from its adapter alone."""
    folder = write_run(tmp_path_factory.mktemp("others") / "other")
    save_adapter(folder / "adapter", "patterns")
    return folder


def promise(process: LimitedProcess, run: Path, name: str, other: Path):
    """Return a check that a run with one file changed is shown, or refused by its name."""
    path = run / name
    good = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            said = process.read(str(run), str(other))
        finally:
            path.write_bytes(good)
        assert all(path.name in error for error in said), said

    return check


@pytest.fixture(scope="module")
def process(limited: Limit, run: Path, other: Path) -> LimitedProcess:
    return limited(use_run, (str(run), str(other)))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", ["ranks.jsonl", "metrics.jsonl"])
def test_changed_lines_are_shown_or_refused(
    process: LimitedProcess, run: Path, other: Path, name: str, cases: int
) -> None:
    check_cases(cases, mutated_lines(lines_of(run / name)), promise(process, run, name, other))


@pytest.mark.parametrize("cases", CASES)
def test_a_changed_record_is_shown_or_refused(
    process: LimitedProcess, run: Path, other: Path, cases: int
) -> None:
    valid = json.loads((run / "run.json").read_bytes())
    check_cases(cases, mutated_json(valid), promise(process, run, "run.json", other))


@pytest.mark.parametrize("cases", CASES)
def test_a_changed_configuration_is_shown_or_refused(
    process: LimitedProcess, run: Path, other: Path, cases: int
) -> None:
    text = (run / "config.yaml").read_bytes()
    files = mutated_yaml(yaml.safe_load(text), text)
    check_cases(cases, files, promise(process, run, "config.yaml", other))


@pytest.mark.parametrize("cases", CASES)
def test_a_changed_adapter_is_shown_or_refused(
    process: LimitedProcess, run: Path, other: Path, cases: int
) -> None:
    name = "adapter/adapter_model.safetensors"
    valid = (other / name).read_bytes()
    check_cases(cases, mutated_safetensors(valid), promise(process, other, name, run))
