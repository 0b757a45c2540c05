"""Classes with names, which come from folders of images: one number a name, whatever is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynlora.cli.main import main
from tests.cli.finished import read_json
from tests.jobs import job_values, write_job
from tests.pictures import save_class_folders, save_vit

NAMES = ("ants", "bees", "wasps")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run on three classes, and its data; nobody may change it."""
    root = tmp_path_factory.mktemp("named")
    for split, count in (("train", 12), ("validation", 6)):
        save_class_folders(root / "data" / split, count, NAMES)
    values = job_values(save_vit(root / "vit"), root / "data", root / "run")
    values["task"] = "image_classification"
    values["training"]["max_steps"] = 2
    assert main(["train", str(write_job(root / "job.yaml", values)), "--quiet"]) == 0
    return root


@pytest.fixture
def part(root: Path, tmp_path: Path) -> Path:
    """Return a folder whose split `test` holds only two of the classes, and no other split."""
    for name in NAMES[1:]:
        shutil.copytree(root / "data" / "validation" / name, tmp_path / "part" / "test" / name)
    return tmp_path / "part"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_and_a_merged_model_have_the_names(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_json(root / "run" / "run.json")["class_names"] == [*NAMES]
    merged = ("--format", "merged", "--output", tmp_path / "m")
    said(capsys, "export", root / "run" / "adapter", *merged)
    config = read_json(tmp_path / "m" / "config.json")
    assert [*config["id2label"].values()] == [*NAMES]
    assert [*config["label2id"]] == [*NAMES]


def test_a_split_without_some_class_changes_no_number(
    root: Path, part: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(capsys, "eval", root / "run", "--data", part, "--split", "test")
    assert [row["labelled"] for row in found["classes"]] == [0, 2, 2]
    assert [row["name"] for row in found["classes"]] == [*NAMES]
    predicted = said(capsys, "predict", root / "run", part / "test")["predictions"]
    true = [1, 1, 2, 2]
    right = sum(row["prediction"] == label for row, label in zip(predicted, true, strict=True))
    assert found["metrics"]["accuracy"] == right / 4


def test_a_third_split_of_the_runs_own_folder_has_its_numbers(
    root: Path, part: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(root / "run", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(root / "data"), str(part)))
    found = said(capsys, "eval", run, "--split", "test")
    assert [row["labelled"] for row in found["classes"]] == [0, 2, 2]


def test_folders_that_are_no_classes_of_the_run_are_refused(
    root: Path, part: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (part / "test" / "flies").mkdir()
    line = refused("eval", root / "run", "--data", part, "--split", "test")
    assert "ants, bees, wasps, got also flies" in line
    run = shutil.copytree(root / "run", tmp_path / "run")
    facts = read_json(run / "run.json")
    (run / "run.json").write_text(json.dumps(facts | {"class_names": None}))
    assert "numbers alone" in refused("eval", run, "--data", part, "--split", "test")
    (run / "run.json").write_text(json.dumps(facts | {"class_names": [1]}))
    assert "`class_names` of" in refused("eval", run)


def test_a_folder_of_images_is_predicted_by_path_with_names(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    shutil.copytree(root / "data" / "validation", tmp_path / "some" / "deep")
    shutil.copytree(root / "data" / "validation", tmp_path / "some" / ".hidden")
    (tmp_path / "some" / "notes.txt").write_text("none")
    capsys.readouterr()
    assert main(["predict", str(root / "run"), str(tmp_path / "some")]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    paths = sorted(str(p.relative_to(tmp_path / "some")) for p in tmp_path.glob("some/deep/*/*"))
    assert len(paths) == 6
    assert [row["image"] for row in rows] == paths
    assert all(row["class_name"] == NAMES[row["prediction"]] for row in rows)
    assert list(rows[0]) == ["image", "prediction", "class_name", "probabilities"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at least 1 row, got 0" in refused("predict", root / "run", empty)


def test_arrays_are_predicted_with_or_without_their_classes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    files = sorted((root / "data" / "validation").rglob("*.jpg"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(tmp_path / "without.npz", x=images)
    np.savez(tmp_path / "with.npz", x=images, y=np.zeros(len(files), dtype=np.uint8))
    expected = said(capsys, "predict", root / "run", root / "data" / "validation")
    for name in ("without", "with"):
        assert said(capsys, "predict", root / "run", tmp_path / f"{name}.npz") == expected
    line = refused("eval", root / "run", "--data", tmp_path / "without.npz")
    assert "set `data.label`" in line


def test_a_class_of_which_no_row_is_read_has_an_output_too(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "data", tmp_path / "data")
    for image in (tmp_path / "data" / "train" / NAMES[-1]).iterdir():
        image.unlink()
    values = job_values(root / "vit", tmp_path / "data", tmp_path / "run")
    values["task"] = "image_classification"
    values["training"]["max_steps"] = 1
    assert main(["train", str(write_job(tmp_path / "job.yaml", values)), "--quiet"]) == 0
    assert read_json(tmp_path / "run" / "run.json")["num_labels"] == 3
