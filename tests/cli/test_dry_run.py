"""`dynlora train --dry-run`: everything before training, and nothing of it left behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Train = Callable[..., int]


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_says_what_would_be_done_and_writes_nothing(
    train: Train, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    assert train("--dry-run") == 0
    assert snapshot(tmp_path) == before
    assert not output.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: 48 training and 16 validation rows, 2 outputs"
    assert re.fullmatch(r"method dynamic: [\d,]+ LoRA parameters; 12 steps", lines[1])
    assert lines[2].startswith("validation before training: accuracy 0.")
    assert lines[3].startswith(f"would train and write to {output}; nothing was written")
    assert len(lines) == 4


def test_it_tells_what_the_run_then_does(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert train("--quiet") == 0
    run = json.loads((output / "run.json").read_text())
    assert told["dry_run"] is True
    assert told["steps"] == run["steps"]
    assert told["budget"] == run["budget"]
    assert told["start_parameters"] == run["parameters"]["start"]
    assert told["metrics_before"] == run["metrics_before"]
    assert {"train": told["train_rows"], "validation": told["validation_rows"]} == run["rows"]
    assert told["output"] == str(output)
    assert told["replaces_run"] is False


def test_a_run_that_would_be_replaced_or_gone_on_with_is_told_and_left_alone(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--training.epochs", 1, "--quiet") == 0
    before = snapshot(output)
    assert train("--dry-run", "--overwrite", "true") == 0
    assert f"write to {output}, replacing the run there;" in capsys.readouterr().out
    assert train("--training.epochs", 1, "--training.resume", "latest", "--dry-run") == 0
    assert f"write to {output}, going on from step 6;" in capsys.readouterr().out
    assert snapshot(output) == before


def test_the_switch_may_stand_before_other_options(train: Train, output: Path) -> None:
    assert train("--dry-run", "--method", "lora") == 0
    assert not output.exists()


def test_what_a_run_refuses_a_dry_run_refuses(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, told in (
        (("--data.label", "lable"), "'lable'"),
        (("--lora.target_modules", "[qery]"), "'qery'"),
        (("--lora.r", "0"), "`lora.r` must be >= 1, but got 0"),
    ):
        assert train("--dry-run", *options) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert told in printed.err
    assert not output.exists()


def test_a_run_already_there_is_refused_and_kept(
    train: Train, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--training.epochs", 1, "--quiet") == 0
    before = snapshot(output)
    assert train("--dry-run") == 2
    assert "`--overwrite true`" in capsys.readouterr().err
    assert snapshot(output) == before
