"""Paths that no file can have: one error line with the system's reason, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dynlora.cli.main import main

TEXT = "What is LoRA? " * 400
LONG = "x" * 300
Captured = pytest.CaptureFixture[str]


def refused(arguments: list[str], capsys: Captured) -> str:
    """Return the one line with which arguments are refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert (len(lines), printed.out) == (1, "")
    assert "Traceback" not in printed.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (["train", "PATH"], LONG),
        (["eval", "PATH"], TEXT),
        (["predict", "PATH", "rows.jsonl"], LONG),
        (["compare", "PATH", "PATH"], LONG),
        (["inspect", "PATH"], TEXT),
        (["export", "adapter", "--format", "native", "--output", "PATH"], LONG),
        (["compress", "PATH", "--budget", "9", "--output", "made"], LONG),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_name_that_is_too_long_is_told_with_the_systems_reason(
    arguments: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = refused([path if word == "PATH" else word for word in arguments], capsys)
    assert "File name too long" in line
    assert path[:40] in line
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["output", "data.path", "model.path", "lora.start_from"])
def test_so_is_a_key_of_the_configuration(
    key: str, job: Path, output: Path, capsys: Captured
) -> None:
    line = refused(["train", str(job), f"--{key}", LONG], capsys)
    assert LONG[:40] in line
    assert not output.exists()


@pytest.mark.parametrize("key", ["output", "data.train_split", "training.resume"])
def test_a_key_with_a_character_that_no_path_has_is_refused(
    key: str, error: Callable[..., str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    assert error(f"--{key}", "a\0b").startswith(f"`{key}` must be a text without NUL, but got '")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_of_such_a_key_is_refused(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    values = yaml.safe_load(job.read_text())
    job.write_text(yaml.safe_dump(values | {"output": "a\0b"}))
    assert "`output` must be a text without NUL, but got 'a\\x00b'" in refused(
        ["train", str(job)], capsys
    )


def test_an_output_beside_a_finished_run_is_checked_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["eval", str(finished), "--output", LONG],
        ["report", str(finished), "--output", LONG],
        ["predict", str(finished), "rows.jsonl", "--output", f"{LONG}.jsonl"],
    ):
        assert "File name too long" in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_without_a_file_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (OSError("a message alone"), OSError(12, "Cannot allocate memory")):

        def fail(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr("dynlora.cli.main._dispatch", fail)
        with pytest.raises(OSError, match=error.args[-1]):
            main(["schema"])


@pytest.mark.parametrize(
    ("arguments", "given", "told"),
    [
        (["eval", "run", "--output", "GIVEN"], "", "must be a path, but got ''"),
        (["predict", "run", "rows.jsonl", "--output", "GIVEN"], " ", "must be a path, but got ' '"),
        (["report", "GIVEN"], "", "must be a path, but got ''"),
        (["compress", "adapter", "--budget", "9", "--output", "GIVEN"], "", "must be a path"),
        (["inspect", "GIVEN"], " ", "must be a path, but got ' '"),
        (["eval", "GIVEN"], "a\0b", "must be a path without NUL, but got 'a\\x00b'"),
        (["predict", "run", "GIVEN"], "a\0b", "must be a path without NUL, but got 'a\\x00b'"),
    ],
)
def test_an_empty_path_and_one_with_nul_are_refused(
    arguments: list[str], given: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert told in refused([given if word == "GIVEN" else word for word in arguments], capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_output_of_a_job_is_refused(
    train: Callable[..., int], error: Callable[..., str], output: Path
) -> None:
    for given in ("", " "):
        told = error("--output", given)
        assert told.startswith(f"`output` must be the path of a folder, but got {given!r}")
    assert not output.exists()
