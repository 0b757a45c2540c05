"""Rows of `multi_label` without any class: refused where they decide, told where they do not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import make_rows, write_rows

OPTIONS = ("--task", "multi_label", "--training.max_steps", 1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        given = [row | {"label": []} for row in make_rows(12)]
        write_rows(tmp_path / "rows" / f"{split}.jsonl", given)
    return tmp_path / "rows"


def test_rows_of_which_nothing_can_be_learned_are_refused(
    error: Callable[..., str], rows: Path
) -> None:
    message = error("--data.path", rows, *OPTIONS)
    assert "'label' holds no class in any of 12 rows of the training split" in message
    assert "`data.label`" in message
    assert "`data.num_labels`" in message


def test_classes_that_nobody_has_are_told(
    train: Callable[..., int], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--data.path", rows, *OPTIONS, "--data.num_labels", 3, "--method", "lora") == 0
    said = capsys.readouterr().err
    for split in ("training", "validation"):
        assert f"holds no class in any of 12 rows of the {split} split" in said
