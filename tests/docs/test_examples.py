"""The example configurations are valid as they are."""

from pathlib import Path

import pytest

from dynlora.cli.job_parser import parse_job

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_is_valid_and_writes_under_runs(path: Path) -> None:
    config = parse_job([str(path)])
    assert config is not None
    assert config.output == f"runs/{path.stem}"


def test_there_is_an_example_of_several_tasks() -> None:
    tasks = {parse_job([str(path)]).task for path in EXAMPLES}
    assert tasks >= {"sequence_classification", "regression", "image_classification"}
