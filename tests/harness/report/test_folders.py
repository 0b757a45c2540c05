"""Folders of results: which files are read as records, and which folders are refused."""

import pytest

from benchmarks.harness.report.folders import read_records
from dynlora.errors import RunFileError
from tests.harness.report.records import values, write


def test_a_folder_of_studies_and_a_study_are_both_read(tmp_path):
    first = write(tmp_path / "first", values(), values(seed=1))
    write(tmp_path / "second", values(study="second"))
    assert len(read_records([tmp_path])) == 3
    assert {record.study for record in read_records([first])} == {"first"}


def test_files_beside_the_folders_of_studies_are_no_records(tmp_path):
    write(tmp_path / "first", values())
    (tmp_path / "mrpc.json").write_text('{"runs": []}')
    (tmp_path / "first" / "trials.db").write_text("no JSON")
    assert len(read_records([tmp_path])) == 1


def test_a_folder_given_twice_is_read_once(tmp_path):
    first = write(tmp_path / "first", values())
    assert len(read_records([tmp_path, first, tmp_path / "first" / ".." / "first"])) == 1


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(RunFileError, match=f"got {tmp_path}, where there is none"):
        read_records([tmp_path])


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(RunFileError, match=r"got .*missing, which is not there"):
        read_records([tmp_path / "missing"])
    (tmp_path / "file").touch()
    with pytest.raises(RunFileError, match=r"got .*file, which is a file"):
        read_records([tmp_path / "file"])


@pytest.mark.parametrize("text", ['{"study": ', "[1]", "", "\ufeff{}"])
def test_a_broken_file_is_named(tmp_path, text):
    broken = write(tmp_path / "first", values()) / "broken.json"
    broken.write_text(text, encoding="utf-8")
    with pytest.raises(RunFileError, match=r"first/broken.json must be one whole JSON object"):
        read_records([tmp_path])
