"""Every study that comes with the project is one that can be run, and the derived tasks hold."""

from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks import derive_mixture, derive_recovery, derive_shift, derive_tasks
from benchmarks.harness.runs import resolve_jobs
from benchmarks.harness.study import read_study
from dynlora.cli.job_parser import check_keys, parse_values

ROOT = Path(__file__).parent.parent.parent
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))


def derive(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a derivation as its command would, from and to one folder."""
    monkeypatch.setattr("sys.argv", [module.__name__, str(folder), str(folder)])
    module.main()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_resolves_to_jobs(path: Path) -> None:
    study = read_study(path, check_keys)
    jobs = resolve_jobs(study, parse_values)
    assert len(jobs.configs) == len(study.models) * len(study.tasks) * len(study.methods)
    assert study.results == Path("benchmarks/results")


def test_derived_tasks_ask_for_what_the_meaning_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meanings = ["name[The Eagle], food[French]", "name[Cotto], area[city centre], food[English]"]
    (tmp_path / "e2e_nlg").mkdir()
    for split in derive_tasks.SPLITS:
        rows = pa.table({"mr": meanings, "ref": ["first", "second"]})
        pq.write_table(rows, tmp_path / "e2e_nlg" / f"{split}.parquet")
    derive(derive_tasks, tmp_path, monkeypatch)
    assert "8 slots, 3 values" in capsys.readouterr().out
    asked = {
        task: {row["text"]: row["label"] for row in pq.read_table(path).to_pylist()}
        for task in ("e2e_slots", "e2e_values")
        if (path := tmp_path / task / "test.parquet")
    }
    assert asked["e2e_slots"] == {"first": [4, 5], "second": [0, 4, 5]}
    # In order: area=city centre, food=English, food=French.
    assert asked["e2e_values"] == {"first": [2], "second": [0, 1]}


def test_a_mixture_has_classes_of_each_task_and_no_row_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, (first, second, classes) in derive_mixture.TASKS.items():
        columns = {
            first: [f"{task} {n}" for n in range(12)],
            "label": [n % classes for n in range(12)],
        }
        if second is not None:
            columns[second] = [f"and {task} {n}" for n in range(12)]
        (tmp_path / task).mkdir()
        pq.write_table(pa.table(columns), tmp_path / task / "train.parquet")
    monkeypatch.setattr(derive_mixture, "ROWS", {"train": 8, "validation": 1, "test": 3})
    derive(derive_mixture, tmp_path, monkeypatch)
    assert "test: 15 rows of 11 classes" in capsys.readouterr().out
    tables = [pq.read_table(path) for path in (tmp_path / "mixture").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert len({row["text"] for row in rows}) == len(rows) == 60
    first_of = {"sst2": 0, "cola": 2, "mrpc": 4, "qnli": 6, "mnli": 8}
    for row in rows:
        task, number = row["text"].split()
        assert row["label"] == first_of[task] + int(number) % (3 if task == "mnli" else 2)
        assert row["text_pair"] == ("" if task in ("sst2", "cola") else f"and {row['text']}")


def test_a_shift_is_learned_from_one_domain_and_tested_on_all_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for domain in ("books", "kitchen"):
        (tmp_path / f"blitzer_{domain}").mkdir()
        for split in derive_shift.SPLITS:
            table = pa.table({"text": [f"{domain} {split}"], "label": [1]})
            pq.write_table(table, tmp_path / f"blitzer_{domain}" / f"{split}.parquet")
    derive(derive_shift, tmp_path, monkeypatch)
    texts = {
        path.stem: [row["text"] for row in pq.read_table(path).to_pylist()]
        for path in (tmp_path / "books_to_kitchen").glob("*.parquet")
    }
    assert texts == {
        "train": ["books train"],
        "validation": ["books validation"],
        "test": ["kitchen train", "kitchen validation"],
    }


def test_recovery_asks_half_the_model_for_what_the_whole_one_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a fine film", "what is a film?", "no", "a fine film", " ".join(["long"] * 40)]
    for source, column in derive_recovery.TEXTS.values():
        (tmp_path / source).mkdir()
        pq.write_table(pa.table({column: texts}), tmp_path / source / "train.parquet")
    monkeypatch.setattr(derive_recovery, "ROWS", {"train": 2, "validation": 1, "test": 1})
    derive(derive_recovery, tmp_path, monkeypatch)
    assert "reviews: 2 train, 1 validation, 1 test rows" in capsys.readouterr().out
    tables = [pq.read_table(path) for path in (tmp_path / "questions").glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert sorted(row["text"] for row in rows) == sorted(set(texts))
    tokenizer = AutoTokenizer.from_pretrained(derive_recovery.MODEL)
    whole = AutoModel.from_pretrained(derive_recovery.MODEL).eval()
    half = AutoModel.from_pretrained(tmp_path / "minilm_3_blocks").eval()
    assert len(half.encoder.layer) == 3
    for row in rows:
        inputs = tokenizer(row["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            states = whole(**inputs, output_hidden_states=True).hidden_states
            middle = half(**inputs).last_hidden_state
        torch.testing.assert_close(torch.tensor(row["label"]), states[-1][0].mean(dim=0))
        torch.testing.assert_close(middle, states[3])
