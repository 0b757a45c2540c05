"""YAML that users write: the configuration of a job, and that of a study."""

from pathlib import Path

import pytest
import yaml

from tests.fuzz.conftest import Limit
from tests.fuzz.mutations import mutated_yaml
from tests.fuzz.promise import CASES, check_cases
from tests.fuzz.reading import read_job, read_study
from tests.harness.studies import TUNE, study_values
from tests.jobs import job_values

READERS = {
    "job.yaml": (read_job, job_values(Path("model"), Path("rows"), Path("run"))),
    "study.yaml": (read_study, study_values(tune=TUNE)),
}
"""By name, what reads the file, and what it holds."""


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", READERS)
def test_a_changed_configuration_is_read_or_refused(
    limited: Limit, tmp_path_factory: pytest.TempPathFactory, name: str, cases: int
) -> None:
    path = tmp_path_factory.mktemp("configurations") / name
    read, values = READERS[name]
    path.write_text(yaml.safe_dump(values))
    process = limited(read, (str(path),))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        # A value is named by its key: it may as well stand on the command line.
        assert all(str(path) in error or error.count("`") >= 2 for error in process.read(str(path)))

    check_cases(cases, mutated_yaml(values, yaml.safe_dump(values).encode()), check)
