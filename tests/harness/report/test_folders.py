"""Folders of results: which studies are read, and which places are refused."""

import json

import pytest

from benchmarks.harness.records import Files
from benchmarks.harness.report.folders import read_records
from dynlora.errors import RunFileError
from dynlora.files.json_files import write_json
from tests.harness.report.records import values, write


def test_a_folder_of_studies_and_a_study_are_both_read(tmp_path):
    write(tmp_path, values(), values(seed=1))
    write(tmp_path, values(study="second"))
    assert len(read_records([tmp_path])) == 3
    assert {record.study for record in read_records([tmp_path / "first.csv"])} == {"first"}


def test_other_files_beside_the_tables_are_no_records(tmp_path):
    write(tmp_path, values())
    (tmp_path / "mrpc.json").write_text('{"runs": []}')
    (tmp_path / "notes.csv").write_text("a,b")
    assert len(read_records([tmp_path])) == 1


def test_a_folder_given_twice_is_read_once(tmp_path):
    write(tmp_path, values())
    assert (
        len(read_records([tmp_path, tmp_path / "first.csv", tmp_path / ".." / tmp_path.name])) == 1
    )


def test_runs_of_a_study_that_was_killed_are_read_too(tmp_path):
    write(tmp_path, values())
    write_json(Files(tmp_path, "first").parts / "final-x.json", values(seed=1, key="x"))
    write_json(Files(tmp_path, "other").parts / "final-y.json", values(study="other", key="y"))
    found = [(record.study, record.seed) for record in read_records([tmp_path])]
    assert found == [("first", 0), ("first", 1), ("other", 0)]


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(RunFileError, match=f"got {tmp_path}, where there are none"):
        read_records([tmp_path])


def test_a_place_without_records_is_refused(tmp_path):
    with pytest.raises(RunFileError, match=r"got .*missing, which is not there"):
        read_records([tmp_path / "missing"])
    (tmp_path / "file").touch()
    with pytest.raises(RunFileError, match=r"got .*file, which is neither"):
        read_records([tmp_path / "file"])


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".config.json", '{"format": '),
        (".config.json", "[1]"),
        (".config.json", json.dumps({"format": 2, "shared": {}, "layers": [[]]})),
        (".csv", ""),
        (".csv", "kind,model\nfinal,minilm\n"),
        (".ranks.csv", "key,step,layer,rank\n0000,1\n"),
        (".ranks.csv", "key,step,layer,rank\n0000,one,a,2\n"),
    ],
)
def test_a_broken_file_is_named(tmp_path, ending, text):
    write(tmp_path, values())
    (tmp_path / f"first{ending}").write_text(text, encoding="utf-8")
    with pytest.raises(RunFileError, match=r"first.csv, .* must be the tables of a study's rec"):
        read_records([tmp_path])
