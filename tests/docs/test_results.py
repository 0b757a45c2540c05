"""The committed records are the tables that the harness would write, and a report reads them."""

from pathlib import Path

import pytest

from benchmarks.harness.main import main
from benchmarks.harness.records import Files
from benchmarks.harness.tables import ENDINGS, SHARED, to_texts

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STUDIES = sorted(path.name.removesuffix(SHARED) for path in RESULTS.glob(f"*{SHARED}"))


@pytest.mark.parametrize("study", STUDIES)
def test_committed_tables_are_what_the_harness_would_write(study):
    files = Files(RESULTS, study)
    texts = {ending: files.of(ending).read_text(encoding="utf-8") for ending in ENDINGS}
    assert to_texts(files.read()) == texts


def test_a_committed_study_gives_a_report(tmp_path):
    document = tmp_path / "report.md"
    assert main(["report", str(RESULTS / "mrpc_longer.csv"), "--output", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert "## mrpc_longer" in text
    assert "| dynamic | 10 of 10 |" in text
