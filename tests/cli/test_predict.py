"""`dynlora predict`: one prediction a row, in every format, and input to be mended."""

import csv
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from dynlora.cli.main import main
from dynlora.train.task import Predictor
from tests.cli.finished import facts, finish, read_lines, stock_logits
from tests.jobs import make_rows, missing, write_rows


@pytest.fixture
def predict(capsys):
    """Return a runner of `dynlora predict`; it returns the lines of the standard output."""

    def run(*arguments):
        capsys.readouterr()
        assert main(["predict", *map(str, arguments)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def file(tmp_path):
    rows = [
        {"id": f"row-{number}", "text": row["text"]}
        for number, row in enumerate(make_rows(11, seed=4))
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_each_row_gets_what_stock_libraries_say_in_its_order(
    predict, finished_by, file, model, method
):
    run, given = finished_by(method), read_lines(file)
    found = predict(run, file)
    probabilities = stock_logits(run, model, [row["text"] for row in given]).softmax(dim=-1)
    assert [row["prediction"] for row in found] == probabilities.argmax(dim=-1).tolist()
    assert len({row["prediction"] for row in found}) == 2, "this test is about rows that differ"
    for row, expected in zip(found, probabilities, strict=True):
        assert row["probabilities"] == pytest.approx(expected.tolist(), abs=2e-6)
        assert all(len(str(number).partition(".")[2]) <= 6 for number in row["probabilities"])
    assert [{key: row[key] for key in ("id", "text")} for row in found] == given


@pytest.mark.parametrize(
    ("source", "target"), [(".jsonl", ".csv"), (".csv", ".parquet"), (".parquet", ".jsonl")]
)
def test_a_file_of_each_format_holds_the_rows_and_their_predictions(
    predict, finished, file, tmp_path, source, target
):
    expected = predict(finished, file)
    given = write_rows(tmp_path / f"given{source}", read_lines(file))
    output = tmp_path / "new" / f"out{target}"
    assert predict(finished, given, "--output", output, "--quiet") == []
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    if target == ".jsonl":
        found = read_lines(output)
    elif target == ".parquet":
        found = pa.parquet.read_table(output).to_pylist()
    else:
        rows = pa.csv.read_csv(output).to_pylist()
        found = [row | {"probabilities": json.loads(row["probabilities"])} for row in rows]
    assert found == expected


def test_columns_of_any_type_are_kept_where_the_format_has_them(predict, finished, tmp_path):
    rows = [
        {"text": 'a "red", cat\nü', "tags": ["x", "y"], "at": None, "deep": {"a": [1.5]},
         "raw": b"\xff\x00"},
        {"text": "dog", "tags": [], "at": 2, "deep": {"a": [float("nan")]}, "raw": None},
    ]  # fmt: skip
    file = write_rows(tmp_path / "rows.parquet", rows)
    found = predict(finished, file)
    assert [row["tags"] for row in found] == [["x", "y"], []]
    assert [row["at"] for row in found] == [None, 2]
    assert [row["deep"] for row in found] == [{"a": [1.5]}, {"a": [None]}], "JSON has no NaN"
    assert "raw" not in found[0]
    for name in ("out.csv", "out.parquet"):
        predict(finished, file, "--output", tmp_path / name, "--quiet")
    options = pa.csv.ParseOptions(newlines_in_values=True)
    table = pa.csv.read_csv(tmp_path / "out.csv", parse_options=options)
    assert table["text"].to_pylist() == [row["text"] for row in rows]
    assert [json.loads(text) for text in table["tags"].to_pylist()] == [["x", "y"], []]
    assert "raw" not in table.column_names
    assert pa.parquet.read_table(tmp_path / "out.parquet")["raw"].to_pylist() == [b"\xff\x00", None]


def test_cells_of_a_csv_file_come_back_as_they_were(predict, finished, tmp_path):
    file, output = tmp_path / "rows.csv", tmp_path / "out.csv"
    file.write_text("text,id,,\nred cat,00123,1,\n5,007,2,\n")
    found = [(row["id"], row["text"]) for row in predict(finished, file)]
    assert found == [("00123", "red cat"), ("007", "5")]
    predict(finished, file, "--output", output, "--quiet")
    with output.open(newline="") as written:
        rows = [row[:4] for row in csv.reader(written)]
    assert rows == [["text", "id", "", ""], ["red cat", "00123", "1", ""], ["5", "007", "2", ""]]


def test_json_is_one_object(predict, said, finished, file, tmp_path):
    lines, value = predict(finished, file, "--quiet"), said("predict", finished, file)
    assert value["rows"] == 11
    assert value["predictions"] == [
        {key: row[key] for key in ("prediction", "probabilities")} for row in lines
    ]
    output = tmp_path / "out.jsonl"
    value = said("predict", finished, file, "--output", output)
    assert value == {"output": str(output), "rows": 11}


def test_nothing_is_lost_to_the_output(predict, refused, finished, file, tmp_path):
    output, link, folder = (tmp_path / name for name in ("out.jsonl", "link.jsonl", "folder.csv"))
    output.write_text("precious")
    link.symlink_to(file)
    folder.mkdir()
    for options, told in (
        ([output], "a file that exists"),
        ([file, "--overwrite"], "another file than FILE"),
        ([link, "--overwrite"], "another file than FILE"),
        ([tmp_path / "out.txt"], "must end in .jsonl, .csv, .parquet"),
        ([folder, "--overwrite"], "a folder"),
        ([output / "out.csv"], "a path must be accessible"),
    ):
        assert told in refused("predict", finished, file, "--output", *options)
    predict(finished, file, "--output", output, "--overwrite", "--quiet")
    assert len(read_lines(output)) == 11


def test_rows_that_a_format_cannot_hold_are_refused_before_anything_is_predicted(
    refused, finished, tmp_path, monkeypatch
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "red cat", "meta": {}}\n')
    monkeypatch.setattr(Predictor, "__init__", lambda *_, **__: pytest.fail("asked too early"))
    message = refused("predict", finished, rows, "--output", tmp_path / "out.parquet")
    assert missing(message, "must be a file that can hold the rows", "ends in .jsonl") == []


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere.csv", None, "a path must be accessible, but got"),
        ("rows.xlsx", b"PK", "must end in .parquet, .csv, .jsonl, .json"),
        ("empty.jsonl", b"", "at least 1 row, got 0"),
        ("heads.csv", b"text,label\n", "at least 1 row, got 0"),
        ("broken.parquet", b"PAR1 and no more", "must be a readable .parquet file"),
        ("columns.csv", b"sentence,label\nred,1\n", "`data.text` names the column 'text'"),
        ("nulls.jsonl", b'{"text":"a"}\n{"text":null}\n{}\n', "2 of 3 rows"),
        ("twice.csv", b"text,z,z\nrow 0,0,1\n", "several are named 'z': rename"),
        ("taken.csv", b"text,prediction\nred,1\n", "the column 'prediction': rename it"),
        ("", None, "which is a folder"),
    ],
)
def test_a_file_that_does_not_hold_what_is_needed_is_refused(
    refused, finished, tmp_path, name, content, told
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = refused("predict", finished, tmp_path / name, "--output", tmp_path / "out.jsonl")
    assert missing(message, told, name) == []


def test_pairs_of_texts_and_three_classes_are_learned_and_predicted(
    predict, refused, tmp_path, model
):
    rows = [row | {"label": place % 3} for place, row in enumerate(make_rows(32))]
    for split in ("train", "validation"):
        write_rows(tmp_path / "three" / f"{split}.parquet", rows)
    options = ("--data.text_pair=other", "--method=lora", "--training.max_steps=2")
    run = finish(tmp_path, model, tmp_path / "three", *options)
    assert facts(run)["num_labels"] == 3
    assert set(facts(run)["metrics_after"]) == {"loss", "accuracy", "f1", "matthews"}
    pair, single = ({"text": "red", "other": "dog"}, {"text": "red"})
    (row,) = predict(run, write_rows(tmp_path / "pairs.jsonl", [pair]))
    assert len(row["probabilities"]) == 3
    message = refused("predict", run, write_rows(tmp_path / "single.jsonl", [single]))
    assert "`data.text_pair` names the column 'other'" in message


def test_rows_that_are_cut_are_counted(finished, tmp_path, capsys):
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "red"}, {"text": "red cat " * 50}])
    assert main(["predict", str(finished), str(rows)]) == 0
    assert "1 of 2 rows of" in capsys.readouterr().err


def test_a_number_of_tokens_is_for_runs_that_write(refused, finished, file):
    message = refused("predict", finished, file, "--max-new-tokens", 5)
    assert "write text only, got 5" in message


FAR = 2**40
"""Seconds after 1970 that no calendar of pyarrow or Python reaches."""


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        (pa.timestamp("s"), 60 * 60 * 24 * 365 * 16_000, "17959-"),
        (pa.large_list(pa.timestamp("s")), [FAR], str(FAR)),
        (pa.list_(pa.timestamp("s"), 1), [FAR], str(FAR)),
        (pa.list_(pa.struct([("at", pa.timestamp("s"))])), [{"at": FAR}], str(FAR)),
        (pa.map_(pa.string(), pa.timestamp("s")), [("at", FAR)], str(FAR)),
    ],
    ids=str,
)
def test_times_that_python_has_none_for_are_written_out(
    predict, finished, tmp_path, kind, value, shown
):
    file, made = tmp_path / "far.parquet", tmp_path / "made.csv"
    until = pa.array([value, None], kind)
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "until": until}), file)
    first, last = predict(finished, file)
    assert shown in str(first["until"])
    assert last["until"] is None
    predict(finished, file, "--output", made, "--quiet")
    assert shown in made.read_text()
