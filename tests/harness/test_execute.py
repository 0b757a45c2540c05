"""One run, from its job to what is known about it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import benchmarks.harness.execute as module
from benchmarks.harness.assignment import Assignment
from benchmarks.harness.execute import execute
from benchmarks.harness.runner import place
from benchmarks.harness.runs import Cell, Run
from dynlora.errors import NonFiniteError
from tests.harness.studies import make_jobs
from tests.jobs import make_rows, save_model, write_rows

Assign = Callable[..., Assignment]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and 48 training rows; there is no other split."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "rows" / "train.jsonl", make_rows(48, seed=1))
    return folder


@pytest.fixture
def examined(world: Path) -> Any:
    """Write the rows of the exam for the time of a test."""
    path = write_rows(world / "rows" / "validation.jsonl", make_rows(16, seed=2))
    yield path
    path.unlink()


@pytest.fixture
def assign(world: Path, tmp_path: Path) -> Assign:
    """Return a function from a method to the assignment of its first trial or final run."""

    def make(
        method: str = "lora", *, final: bool = False, keep: Path | None = None, **changes: Any
    ):
        jobs = make_jobs(tmp_path, methods={"adalora": {"method": "adalora"}}, **changes)
        cell = Cell("tiny", "rows", method, 2)
        run: Run = jobs.trial(cell, 7, 0, jobs.defaults(cell))
        if final:
            run = jobs.final(cell, 0, None)
        config = place(run, {"data": world, "models": world})
        return Assignment(config=config, exam=run.exam, keep=keep, workspace=tmp_path / "work")

    (tmp_path / "work").mkdir()
    return make


@pytest.mark.parametrize("method", ["lora", "dynamic", "adalora"])
def test_a_trial_needs_no_rows_of_the_exam(assign: Assign, method: str, tmp_path: Path) -> None:
    outcome = execute(assign(method))
    assert outcome.status == "completed", outcome.error
    assert outcome.values is not None
    assert outcome.values["test"] is None
    assert outcome.values["rows"] == {"train": 40, "validation": 8}
    assert 0 < outcome.values["validation"]["loss"] < 5
    assert list((tmp_path / "work").iterdir()) == [], "the run's folder is gone"


def test_a_final_run_does(assign: Assign) -> None:
    outcome = execute(assign(final=True))
    assert outcome.status == "failed"
    assert "DataError: the run's data must hold one file named validation" in str(outcome.error)
    assert not outcome.diverged


@pytest.mark.usefixtures("examined")
@pytest.mark.parametrize("method", ["lora", "dynamic", "adalora"])
def test_a_final_run_is_asked_about_the_rows_of_the_exam(assign: Assign, method: str) -> None:
    values = execute(assign(method, final=True)).values
    assert values is not None
    assert values["test_rows"] == 16
    assert values["test"].keys() == values["validation"].keys() == {
        "accuracy", "f1", "matthews", "loss",
    }  # fmt: skip
    assert values["majority"] == 0.5
    assert values["collapsed"] in (True, False)
    assert values["parameters"]["end"] <= values["parameters"]["peak"]
    assert values["steps"] == 10
    assert set(values["final_ranks"].values()) <= set(range(9))
    assert len(values["final_ranks"]) == 13
    assert values["seconds"].keys() >= {"training_steps", "dynamic_part", "evaluation", "test"}
    assert values["peak_memory_bytes"] > 0


@pytest.mark.usefixtures("examined")
def test_the_exams_loss_is_what_stock_libraries_say_of_the_saved_model(
    assign: Assign, world: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    values = execute(assign(final=True, keep=tmp_path / "kept")).values
    assert values is not None
    base = BertForSequenceClassification.from_pretrained(world / "model")
    model = PeftModel.from_pretrained(base, tmp_path / "kept" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = make_rows(16, seed=2)
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    labels = torch.tensor([row["label"] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert values["test"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    right = (logits.argmax(-1) == labels).double().mean()
    assert values["test"]["accuracy"] == pytest.approx(float(right))
    assert values["collapsed"] == (len(logits.argmax(-1).unique()) == 1)


@pytest.mark.usefixtures("examined")
def test_the_exam_can_be_a_sample(assign: Assign) -> None:
    values = execute(assign(final=True, evaluate={"max_rows": 5})).values
    assert values is not None
    assert values["test_rows"] == 5


def test_what_was_done_before_in_the_process_changes_nothing(assign: Assign) -> None:
    first = execute(assign("dynamic")).values
    execute(assign("adalora"))
    again = execute(assign("dynamic")).values
    assert first is not None
    assert again is not None
    for key in ("validation", "final_ranks", "parameters"):
        assert first[key] == again[key]


def test_what_dynlora_warns_of_is_noted(assign: Assign) -> None:
    outcome = execute(assign(base={"data": {"max_length": 8}}))
    assert any("longer than data.max_length=8" in note for note in outcome.notes)


@pytest.mark.parametrize(
    ("error", "status", "diverged"),
    [
        (NonFiniteError("nan"), "failed", True),
        (MemoryError(), "out_of_memory", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 9"), "out_of_memory", False),
        (RuntimeError("shapes do not match"), "failed", False),
    ],
)
def test_what_became_of_a_run_is_told_apart(
    assign: Assign,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str,
    diverged: bool,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "run_job", fail)
    outcome = execute(assign())
    assert (outcome.status, outcome.diverged) == (status, diverged)
    assert outcome.error == f"{type(error).__name__}: {error}"
    assert outcome.values is None


def test_a_learning_rate_beyond_all_reason_is_told_as_that(assign: Assign) -> None:
    given = assign()
    training = replace(given.config.training, learning_rate=1e30, max_grad_norm=0.0)
    outcome = execute(replace(given, config=replace(given.config, training=training)))
    assert (outcome.status, outcome.diverged) == ("failed", True), outcome.error
