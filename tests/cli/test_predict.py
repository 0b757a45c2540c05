"""`dynlora predict`: one prediction a row, in every format, and input to be mended."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from dynlora.cli.main import main
from dynlora.train.task import Predictor
from tests.cli.conftest import snapshot
from tests.cli.finished import finish, read_lines, stock_logits
from tests.jobs import make_rows, write_rows

Predict = Callable[..., list[dict[str, Any]]]
Refused = Callable[..., str]


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Predict:
    """Return a runner of `dynlora predict`; it returns the lines of the standard output."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["predict", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return a runner that must fail, with the run first; it returns the line after `error: `."""

    def run(*arguments: object, folder: Path = finished) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(["predict", str(folder), *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(tmp_path) == before
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of 11 rows without labels."""
    rows = [
        {"id": f"row-{number}", "text": row["text"]}
        for number, row in enumerate(make_rows(11, seed=4))
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_each_row_gets_what_stock_libraries_say_in_its_order(
    predict: Predict,
    finished_by: Callable[[str], Path],
    file: Path,
    model: Path,
    method: str,
) -> None:
    run, given = finished_by(method), read_lines(file)
    found = predict(run, file)
    probabilities = stock_logits(run, model, [row["text"] for row in given]).softmax(dim=-1)
    assert [row["prediction"] for row in found] == probabilities.argmax(dim=-1).tolist()
    assert len({row["prediction"] for row in found}) == 2, "this test is about rows that differ"
    for row, expected in zip(found, probabilities, strict=True):
        assert row["probabilities"] == pytest.approx(expected.tolist(), abs=2e-6)
        assert all(len(str(number).partition(".")[2]) <= 6 for number in row["probabilities"])
    assert [{key: row[key] for key in ("id", "text")} for row in found] == given


def test_a_prediction_does_not_depend_on_its_batch(
    predict: Predict, finished: Path, file: Path
) -> None:
    alone = predict(finished, file, "--batch-size", 1)
    assert len(alone) == 11
    for row, other in zip(alone, predict(finished, file, "--batch-size", 3), strict=True):
        assert row["prediction"] == other["prediction"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=2e-6)


@pytest.mark.parametrize(
    ("source", "target"), [(".jsonl", ".csv"), (".csv", ".parquet"), (".parquet", ".jsonl")]
)
def test_a_file_of_each_format_holds_the_rows_and_their_predictions(
    predict: Predict, finished: Path, file: Path, tmp_path: Path, source: str, target: str
) -> None:
    expected = predict(finished, file)
    given = write_rows(tmp_path / f"given{source}", read_lines(file))
    output = tmp_path / "new" / f"out{target}"
    assert predict(finished, given, "--output", output, "--quiet") == []
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    if target == ".jsonl":
        assert read_lines(output) == expected
    elif target == ".parquet":
        assert pa.parquet.read_table(output).to_pylist() == expected
    else:
        rows = pa.csv.read_csv(output).to_pylist()
        assert [
            row | {"probabilities": json.loads(row["probabilities"])} for row in rows
        ] == expected


def test_columns_of_any_type_are_kept(predict: Predict, finished: Path, tmp_path: Path) -> None:
    rows = [
        {"text": 'a "red", cat\nü', "tags": ["x", "y"], "at": None, "deep": {"a": [1.5]}},
        {"text": "dog", "tags": [], "at": 2, "deep": {"a": [float("nan")]}},
    ]
    file = write_rows(tmp_path / "rows.parquet", rows)
    found = predict(finished, file)
    assert [row["tags"] for row in found] == [["x", "y"], []]
    assert [row["at"] for row in found] == [None, 2]
    assert [row["deep"] for row in found] == [{"a": [1.5]}, {"a": [None]}], "JSON has no NaN"
    output = tmp_path / "out.csv"
    predict(finished, file, "--output", output, "--quiet")
    options = pa.csv.ParseOptions(newlines_in_values=True)
    table = pa.csv.read_csv(output, parse_options=options)
    assert table["text"].to_pylist() == [row["text"] for row in rows]
    assert [json.loads(text) for text in table["tags"].to_pylist()] == [["x", "y"], []]


def test_cells_of_a_csv_file_come_back_as_they_were(
    predict: Predict, finished: Path, tmp_path: Path
) -> None:
    file, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    file.write_text("text,id,,\nred cat,00123,1,\n5,007,2,\n")
    assert [(row["id"], row["text"]) for row in predict(finished, file)] == [
        ("00123", "red cat"), ("007", "5"),
    ]  # fmt: skip
    predict(finished, file, "--output", output, "--quiet")
    with output.open(newline="") as written:
        rows = list(csv.reader(written))
    assert [row[:4] for row in rows] == [
        ["text", "id", "", ""], ["red cat", "00123", "1", ""], ["5", "007", "2", ""],
    ]  # fmt: skip


def test_bytes_are_kept_where_the_format_has_them(
    predict: Predict, finished: Path, tmp_path: Path
) -> None:
    rows = [{"text": "red", "raw": b"\xff\x00"}, {"text": "dog", "raw": None}]
    file = write_rows(tmp_path / "rows.parquet", rows)
    assert "raw" not in predict(finished, file)[0]
    predict(finished, file, "--output", tmp_path / "out.csv", "--quiet")
    assert "raw" not in pa.csv.read_csv(tmp_path / "out.csv").column_names
    predict(finished, file, "--output", tmp_path / "out.parquet", "--quiet")
    assert pa.parquet.read_table(tmp_path / "out.parquet")["raw"].to_pylist() == [b"\xff\x00", None]


def test_json_is_one_object(predict: Predict, finished: Path, file: Path, tmp_path: Path) -> None:
    lines = predict(finished, file, "--quiet")
    (value,) = predict(finished, file, "--json")
    assert value["rows"] == 11
    assert value["predictions"] == [
        {key: row[key] for key in ("prediction", "probabilities")} for row in lines
    ]
    output = tmp_path / "out.jsonl"
    assert predict(finished, file, "--json", "--output", output) == [
        {"output": str(output), "rows": 11}
    ]


def test_nothing_is_lost_to_the_output(
    predict: Predict, refused: Refused, finished: Path, file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert "a file that exists" in refused(file, "--output", output)
    assert "another file than FILE" in refused(file, "--output", file, "--overwrite")
    link = tmp_path / "link.jsonl"
    link.symlink_to(file)
    assert "another file than FILE" in refused(file, "--output", link, "--overwrite")
    assert "must end in .jsonl, .csv, .parquet" in refused(file, "--output", tmp_path / "out.txt")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "a folder" in refused(file, "--output", folder, "--overwrite")
    predict(finished, file, "--output", output, "--overwrite", "--quiet")
    assert len(read_lines(output)) == 11


def test_a_file_that_cannot_be_written_is_said(
    refused: Refused, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    assert "could not be written" in refused(file, "--output", tmp_path / "taken" / "out.csv")


def test_rows_that_a_format_cannot_hold_are_refused_before_anything_is_predicted(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "red cat", "meta": {}}\n')
    monkeypatch.setattr(Predictor, "__init__", lambda *_, **__: pytest.fail("asked too early"))
    told = refused(rows, "--output", tmp_path / "out.parquet")
    assert "must be a file that can hold the rows" in told
    assert "ends in .jsonl" in told
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere.csv", None, "FILE must be a file that exists, got"),
        ("rows.xlsx", b"PK", "must end in .parquet, .csv, .jsonl"),
        ("empty.jsonl", b"", "at least 1 row, got 0"),
        ("heads.csv", b"text,label\n", "at least 1 row, got 0"),
        ("broken.parquet", b"PAR1 and no more", "must be a readable .parquet file"),
        ("columns.csv", b"sentence,label\nred,1\n", "`data.text` names the column 'text'"),
        ("nulls.jsonl", b'{"text":"a"}\n{"text":null}\n{}\n', "2 of 3 rows"),
        ("taken.csv", b"text,prediction\nred,1\n", "the column 'prediction': rename it"),
    ],
)
def test_a_file_that_does_not_hold_what_is_needed_is_refused(
    refused: Refused, tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name, "--output", tmp_path / "out.jsonl")
    assert told in message
    assert name in message


def test_a_run_that_is_not_finished_is_refused(
    refused: Refused, file: Path, tmp_path: Path
) -> None:
    assert "has no run.json" in refused(file, folder=tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "method": "lora"}))
    assert "ended with an error" in refused(file, folder=tmp_path)


def test_two_texts_are_read_where_the_run_learned_from_pairs(
    predict: Predict, refused: Refused, tmp_path: Path, model: Path, data: Path
) -> None:
    run = finish(tmp_path, model, data, "--data.text_pair", "other", "--method", "lora")
    file = write_rows(tmp_path / "pairs.jsonl", [{"text": "red", "other": "dog"}])
    assert len(predict(run, file)) == 1
    file = write_rows(tmp_path / "single.jsonl", [{"text": "red"}])
    assert "`data.text_pair` names the column 'other'" in refused(file, folder=run)


def test_a_number_of_tokens_is_for_runs_that_write(
    refused: Refused, file: Path, finished: Path
) -> None:
    message = refused(file, "--max-new-tokens", 5)
    assert "`task: causal_lm` only, got 5" in message
    assert "0 is not in the range x>=1" in refused(file, "--max-new-tokens", 0)


def test_a_folder_is_refused_where_texts_are_read(refused: Refused, tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert f"FILE must be a file, got {tmp_path}, which is a folder" in message
    assert "one of sequence_classification" in message


def test_columns_of_one_name_are_no_json(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "twice.csv"
    file.write_text("text,z,z\nrow 0,0,1\n")
    assert "several are named 'z': rename" in refused(file)


FAR = 2**40
"""Seconds after 1970 that no calendar of pyarrow or Python reaches."""


def test_times_that_python_has_none_for_are_written_out(
    predict: Predict, finished: Path, tmp_path: Path
) -> None:
    file, ages = tmp_path / "far.parquet", 60 * 60 * 24 * 365 * 16_000
    times = pa.array([0, ages], pa.timestamp("s"))
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "until": times}), file)
    first, last = predict(finished, file)
    assert first["until"].startswith("1970-01-01 00:00:00")
    assert last["until"].startswith("17959-")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.large_list(pa.timestamp("s")), [FAR]),
        (pa.list_(pa.timestamp("s"), 1), [FAR]),
        (pa.list_(pa.struct([("at", pa.timestamp("s"))])), [{"at": FAR}]),
        (pa.map_(pa.string(), pa.timestamp("s")), [("at", FAR)]),
    ],
    ids=str,
)
def test_so_are_such_times_in_lists_and_records(
    predict: Predict, finished: Path, tmp_path: Path, kind: pa.DataType, value: Any
) -> None:
    file = tmp_path / "far.parquet"
    until = pa.array([value, None], kind)
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "until": until}), file)
    first, last = predict(finished, file)
    assert str(FAR) in str(first["until"])
    assert last["until"] is None
    assert main(["predict", str(finished), str(file), "--output", str(tmp_path / "made.csv")]) == 0
    assert str(FAR) in (tmp_path / "made.csv").read_text()
