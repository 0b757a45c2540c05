"""The studies and records of this repository: each is valid, and derived tasks are correct."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.data import derive
from benchmarks.harness.command import main
from benchmarks.harness.records import RecordFiles
from benchmarks.harness.runs import resolve_jobs
from benchmarks.harness.study import read_study
from benchmarks.harness.tables import ENDINGS, SHARED, to_texts

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))
RESULTS = ROOT / "benchmarks" / "results"
RECORDED = sorted(path.name.removesuffix(SHARED) for path in RESULTS.glob(f"*{SHARED}"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_resolves_to_jobs(path):
    study = read_study(path)
    jobs = resolve_jobs(study)
    assert len(jobs.configs) == len(study.models) * len(study.tasks) * len(study.methods)
    assert study.results == Path("benchmarks/results")


@pytest.mark.parametrize("study", RECORDED)
def test_committed_records_are_read_back_equal(study):
    files = RecordFiles(RESULTS, study)
    texts = {ending: files.of(ending).read_text(encoding="utf-8") for ending in ENDINGS}
    assert to_texts(files.read()) == texts


def test_a_report_on_a_committed_study_is_written(tmp_path):
    document = tmp_path / "report.md"
    assert main(["report", str(RESULTS / "mrpc_longer.csv"), "--output", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert "| dynamic | 10 of 10 |" in text


def test_derived_labels_are_those_of_the_meaning(tmp_path, capsys):
    meanings = ["name[The Eagle], food[French]", "name[Cotto], area[city centre], food[English]"]
    (tmp_path / "e2e_nlg").mkdir()
    for split in derive.SPLITS:
        rows = pa.table({"mr": meanings, "ref": ["first", "second"]})
        pq.write_table(rows, tmp_path / "e2e_nlg" / f"{split}.parquet")
    derive.e2e(tmp_path, tmp_path)
    assert "8 slots, 3 values" in capsys.readouterr().out
    asked = {
        task: {row["text"]: row["label"] for row in pq.read_table(path).to_pylist()}
        for task in ("e2e_slots", "e2e_values")
        if (path := tmp_path / task / "test.parquet")
    }
    assert asked["e2e_slots"] == {"first": [4, 5], "second": [0, 4, 5]}
    # In order: area=city centre, food=English, food=French.
    assert asked["e2e_values"] == {"first": [2], "second": [0, 1]}


def test_a_mixture_has_classes_of_each_task_and_no_row_twice(tmp_path, monkeypatch, capsys):
    for task, (first, second, classes) in derive.MIXED.items():
        columns = {
            first: [f"{task} {n}" for n in range(12)],
            "label": [n % classes for n in range(12)],
        }
        if second is not None:
            columns[second] = [f"and {task} {n}" for n in range(12)]
        (tmp_path / task).mkdir()
        pq.write_table(pa.table(columns), tmp_path / task / "train.parquet")
    monkeypatch.setattr(derive, "MIXTURE", {"train": 8, "validation": 1, "test": 3})
    derive.mixture(tmp_path, tmp_path)
    assert "test: 15 rows of 11 classes" in capsys.readouterr().out
    tables = [pq.read_table(path) for path in (tmp_path / "mixture").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["text"] for row in rows}) == len(rows) == 60
    first_of = {"sst2": 0, "cola": 2, "mrpc": 4, "qnli": 6, "mnli": 8}
    for row in rows:
        task, number = row["text"].split()
        assert row["label"] == first_of[task] + int(number) % (3 if task == "mnli" else 2)
        assert row["text_pair"] == ("" if task in ("sst2", "cola") else f"and {row['text']}")


def test_a_shift_is_tested_on_all_rows_of_the_other_domain(tmp_path):
    for domain in ("books", "kitchen"):
        (tmp_path / f"blitzer_{domain}").mkdir()
        for split in derive.SPLITS[:2]:
            table = pa.table({"text": [f"{domain} {split}"], "label": [1]})
            pq.write_table(table, tmp_path / f"blitzer_{domain}" / f"{split}.parquet")
    derive.shift(tmp_path, tmp_path)
    texts = {
        path.stem: [row["text"] for row in pq.read_table(path).to_pylist()]
        for path in (tmp_path / "books_to_kitchen").glob("*.parquet")
    }
    assert texts == {
        "train": ["books train"],
        "validation": ["books validation"],
        "test": ["kitchen train", "kitchen validation"],
    }


def test_labels_of_recovery_are_embeddings_of_the_whole_model(tmp_path, monkeypatch, capsys):
    texts = ["a fine film", "what is a film?", "no", "a fine film", " ".join(["long"] * 40)]
    for source, column in derive.TEXTS.values():
        (tmp_path / source).mkdir()
        pq.write_table(pa.table({column: texts}), tmp_path / source / "train.parquet")
    monkeypatch.setattr(derive, "RECOVERY", {"train": 2, "validation": 1, "test": 1})
    derive.recovery(tmp_path, tmp_path)
    assert "reviews: 2 train, 1 validation, 1 test rows" in capsys.readouterr().out
    tables = [pq.read_table(path) for path in (tmp_path / "questions").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["text"] for row in rows) == sorted(set(texts))
    tokenizer = AutoTokenizer.from_pretrained(derive.minilm())
    whole = AutoModel.from_pretrained(derive.minilm()).eval()
    half = AutoModel.from_pretrained(tmp_path / "minilm_3_blocks").eval()
    assert len(half.encoder.layer) == 3
    for row in rows:
        inputs = tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            states = whole(**inputs, output_hidden_states=True).hidden_states
            middle = half(**inputs).last_hidden_state
        torch.testing.assert_close(torch.tensor(row["label"]), states[-1][0].mean(dim=0))
        torch.testing.assert_close(middle, states[3])
