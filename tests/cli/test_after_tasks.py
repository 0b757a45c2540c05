"""`dynlora eval` and `dynlora predict` after a run of each task: its own numbers, a line a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from dynlora.cli.main import main
from dynlora.train.config import METRICS
from tests.cli.finished import read_json, read_lines
from tests.cli.test_tasks import rows_of
from tests.jobs import job_values, save_model, write_job, write_rows
from tests.language import language_job, save_language_model, write_pairs
from tests.pictures import save_vit

TASKS = (
    "regression",
    "multi_label",
    "embedding",
    "token_classification",
    "image_classification",
    "causal_lm",
)
ROWS = 14


@pytest.fixture(scope="module", params=TASKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of a task; its validation rows are beside it."""
    task, root = request.param, tmp_path_factory.mktemp(request.param)
    job = write_job(root / "job.yaml", job_of(task, root) | {"task": task})
    assert main(["train", str(job), "--quiet"]) == 0
    return root / "run"


def job_of(task: str, root: Path) -> dict[str, Any]:
    data = root / "data"
    if task == "causal_lm":
        model = save_language_model(root / "model")
        values = language_job(model, write_pairs(data, validation=ROWS), root / "run")
        return values | {"data": values["data"] | {"max_new_tokens": 4}}
    ending = ".parquet" if task == "image_classification" else ".jsonl"
    write_rows(data / f"train{ending}", rows_of(task, 48, 1))
    write_rows(data / f"validation{ending}", rows_of(task, ROWS, 2))
    make = save_vit if task == "image_classification" else save_model
    return job_values(make(root / "model"), data, root / "run")


def file_of(run: Path) -> Path:
    return next((run.parent / "data").glob("validation.*"))


def test_eval_gives_the_numbers_that_the_run_ended_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = read_json(run / "run.json")
    for options in ([], ["--data", str(file_of(run))]):
        assert main(["eval", str(run), *options, "--json"]) == 0
        values = json.loads(capsys.readouterr().out)
        assert values["metrics"] == facts["metrics_after"]
        assert list(values["metrics"]) == list(METRICS[facts["task"]])
        assert values["rows"] == ROWS


def test_predict_says_something_of_each_row_whatever_its_batch(run: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 5):
        output = tmp_path / f"by-{size}.jsonl"
        arguments = [
            str(run),
            str(file_of(run)),
            "--output",
            str(output),
            "--batch-size",
            str(size),
        ]
        assert main(["predict", *arguments, "--quiet"]) == 0
        found.append(read_lines(output))
    assert len(found[0]) == len(found[1]) == ROWS
    for alone, together in zip(*found, strict=True):
        assert alone.keys() == together.keys()
        assert "prediction" in alone
        for key, value in alone.items():
            assert close(together[key], value), key


def test_a_merged_model_says_what_its_outputs_mean(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, task = tmp_path / "made", read_json(run / "run.json")["task"]
    arguments = ["export", run / "adapter", "--format", "merged", "--output", made]
    assert main([*map(str, arguments)]) == 0
    said = read_json(made / "config.json").get("problem_type")
    expected = {"regression": "regression", "multi_label": "multi_label_classification"}
    assert said == expected.get(task)


def close(one: Any, other: Any) -> bool:
    """Return whether two values are equal, numbers to within rounding."""
    if isinstance(one, float):
        return one == pytest.approx(other, abs=1e-4)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other)
