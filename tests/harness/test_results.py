"""Results of studies: records are checked, grouped and found in folders."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.harness.records import RecordFiles
from benchmarks.harness.report.results import Cell, Result, group, read_result, read_results
from dynlora.errors import RunFileError
from dynlora.files.json_files import write_json
from tests.harness.records import values, write

CELL = Cell("minilm", "mrpc", 8)
PATH = Path("results/first/0.json")


def results(*runs: dict, folder: str = "first") -> list[Result]:
    return [read_result(Path(f"results/{folder}/{n}.json"), run) for n, run in enumerate(runs)]


def test_only_a_completed_final_run_needs_scores():
    empty = dict.fromkeys(("validation", "parameters", "main_metric", "final_ranks", "tuned"))
    for status in ("failed", "out_of_memory", "interrupted", "running"):
        found = read_result(PATH, values(status=status, error="no luck") | empty)
        assert (found.run.status, found.run.error, found.scores) == (status, "no luck", None)
    assert read_result(PATH, values(kind="trial") | empty).scores is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study": ...}, r"`study` must be given, but got nothing \(results/first/0.json\)"),
        ({"test": {"loss": 1.0}}, r"`test.accuracy` must be given"),
        ({"tuned": {"learning_rate": 1.0}}, r"`tuned.scale` must be given"),
        ({"validation": None}, r"`validation` must be keys and values, but got null"),
        ({"validation": {"loss": "low", "accuracy": 1}}, r"`validation.loss` .* but got low"),
        ({"final_ranks": {"a": -1}}, r"`final_ranks.a` .* equal to 0, but got -1"),
        ({"budget": "8"}, r"`budget` must be a whole number, but got 8"),
        ({"status": "fine"}, r"`status` must be 'completed', .* but got fine"),
        ({"method": " "}, r"`method` must be a name of printable characters"),
        ({"collapsed": "yes"}, r"`collapsed` must be true or false, but got yes"),
    ],
)
def test_an_invalid_value_is_named_with_key_and_place(change, message):
    run = {key: value for key, value in (values() | change).items() if value is not ...}
    with pytest.raises(RunFileError, match=message):
        read_result(PATH, run)


def test_studies_and_runs_are_sorted_in_any_order_of_records():
    runs = [values(seed=seed, method=method) for method in ("b", "lora", "a") for seed in (1, 0)]
    made = results(*runs) + results(values(study="a"), folder="a")
    studies = group(made)
    assert studies == group(made[::-1])
    assert [study.name for study in studies] == ["a", "first"]
    assert [result.run.seed for result in studies[1].runs(CELL, "lora")] == [0, 1]
    assert studies[1].methods(first="lora") == ["lora", "a", "b"]
    assert studies[1].methods(first="missing") == ["a", "b", "lora"]
    (study,) = group(results(*(values(budget=b, description=f"{b}") for b in (16, 2, 8))))
    assert [cell.budget for cell in study.budgets(("minilm", "mrpc"))] == [2, 8, 16]
    assert study.descriptions == ["16", "2", "8"]


NO_NUMBERS = [(4, None), (5, math.nan), (6, math.inf)]


def test_only_completed_and_finite_final_runs_are_usable():
    runs = [
        values(seed=0),
        values(seed=1, status="failed"),
        *({**values(seed=n), "validation": {"loss": x, "accuracy": 0.7}} for n, x in NO_NUMBERS),
        *(values(seed=3, kind="trial", key=str(n)) for n in range(2)),
    ]
    (study,) = group(results(*runs))
    assert list(study.usable(CELL, "lora")) == [0]
    assert study.not_finite(CELL, "lora") == [4, 5, 6]


def test_mixed_results_are_refused():
    mixed = [*results(values()), *results(values(seed=1), folder="other")]
    with pytest.raises(RunFileError, match=r"study 'first' .* results/first and results/other"):
        group(mixed)
    with pytest.raises(RunFileError, match=r"first/0.json and results/first/1.json .* seed 7"):
        group(results(values(seed=7), values(seed=7, key="other")))
    other = values(seed=1, main_metric="f1", validation={"loss": 1.0, "f1": 0.5})
    with pytest.raises(RunFileError, match=r"one main metric, but got accuracy in .* and f1 in"):
        group(results(values(), other))


def test_folders_and_single_studies_are_read_once_with_unmerged_runs(tmp_path):
    write(tmp_path, values(), values(seed=1))
    write(tmp_path, values(study="second"))
    (tmp_path / "mrpc.json").write_text('{"runs": []}')
    (tmp_path / "notes.csv").write_text("a,b")
    write_json(RecordFiles(tmp_path, "first").parts / "final-x.json", values(seed=2, key="x"))
    write_json(RecordFiles(tmp_path, "third").parts / "final-y.json", values(study="third"))
    table = tmp_path / "first.csv"
    found = read_results([tmp_path, table, tmp_path / ".." / tmp_path.name])
    assert [r.run.study for r in found] == ["first"] * 3 + ["second", "third"]
    assert [r.run.seed for r in read_results([table])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("ending", "text"),
    [
        (".config.json", '{"format": '),
        (".config.json", json.dumps({"format": 2, "shared": {}, "layers": [[]]})),
        (".csv", "kind,model\nfinal,minilm\n"),
        (".ranks.csv", "key,step,layer,rank\n0000,1\n"),
        (".ranks.csv", "key,step,layer,rank\n0000,one,a,2\n"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, ending, text):
    write(tmp_path, values())
    (tmp_path / f"first{ending}").write_text(text, encoding="utf-8")
    with pytest.raises(RunFileError, match=r"first.csv, .* must be the tables of a study's rec"):
        read_results([tmp_path])
