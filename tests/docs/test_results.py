"""docs/results.md and its figures are what the committed records of studies give."""

import shutil
from pathlib import Path

import pytest

from benchmarks.harness.main import main
from tests.processes import run_in_group

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "results.md"


def committed() -> list[Path]:
    """Return the records that are committed; a study that runs meanwhile adds others."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return []
    listing = run_in_group(
        ["git", "ls-files", "-z", "benchmarks/results/*/*.json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_the_results_follow_from_the_records(tmp_path, capsys):
    records = committed()
    if not records or not DOCUMENT.exists():
        pytest.skip(f"needs committed records and {DOCUMENT}, of which there are not both yet")
    for path in records:
        copy = tmp_path / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    code = main(["report", str(tmp_path), "--output", str(DOCUMENT), "--check"])
    assert code == 0, capsys.readouterr().err
