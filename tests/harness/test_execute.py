"""One run, from its job to its outcome."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

import benchmarks.harness.execute as module
from benchmarks.harness.assignment import Assignment, Outcome
from benchmarks.harness.execute import execute
from benchmarks.harness.runner import place
from benchmarks.harness.runs import Combination
from dynlora.errors import NonFiniteError
from tests.harness.studies import make_jobs
from tests.jobs import make_rows, save_model, write_rows

Assign = Callable[..., Assignment]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, 48 training rows, and the exam's rows in a second data set."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    for name in ("bare", "rows"):
        write_rows(folder / name / "train.jsonl", make_rows(48, seed=1))
    write_rows(folder / "rows" / "validation.jsonl", make_rows(16, seed=2))
    (folder / "work").mkdir()
    return folder


@pytest.fixture(scope="module")
def assign(world: Path) -> Assign:
    """Return a function from a method to the assignment of its final run or first trial."""

    def make(
        method: str = "lora", *, trial: bool = False, data: str = "rows", keep=None, **changes
    ):
        tasks = {"rows": {"data": {"path": f"{{data}}/{data}"}}}
        methods = {"adalora": {"method": "adalora"}}
        jobs = make_jobs(world, methods=methods, tasks=tasks, **changes)
        own = Combination("tiny", "rows", method, 2)
        run = jobs.trial(own, 7, 0, jobs.defaults(own)) if trial else jobs.final(own, 0, None)
        config = place(run, {"data": world, "models": world})
        return Assignment(config=config, exam=run.exam, keep=keep, workspace=world / "work")

    return make


@pytest.fixture(scope="module")
def first_trial(assign: Assign) -> Outcome:
    """Return the outcome of a trial of `dynamic`, the first run of the process."""
    return execute(assign("dynamic", trial=True, data="bare"))


def test_a_trial_needs_no_rows_of_the_exam(first_trial, assign, world):
    assert first_trial.status == "completed", first_trial.error
    values = first_trial.values
    assert values is not None
    assert values["test"] is None
    assert values["rows"] == {"train": 40, "validation": 8}
    assert 0 < values["validation"]["loss"] < 5
    assert list((world / "work").iterdir()) == [], "the run folder must be temporary"
    outcome = execute(assign(data="bare"))
    assert (outcome.status, outcome.diverged) == ("failed", False)
    assert "DataError: the data must hold one file named validation" in str(outcome.error)


def test_the_exam_agrees_with_stock_libraries_on_the_saved_model(assign, world, tmp_path):
    from peft import PeftModel

    values = execute(assign("dynamic", keep=tmp_path / "kept")).values
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
    assert values["test"].keys() == values["validation"].keys()
    assert values["collapsed"] == (len(logits.argmax(-1).unique()) == 1)
    assert (values["majority"], values["test_rows"], values["steps"]) == (0.5, 16, 10)
    assert values["parameters"]["end"] <= values["parameters"]["peak"]
    assert len(values["final_ranks"]) == 13
    assert values["seconds"].keys() >= {"training_steps", "dynamic_part", "evaluation", "test"}
    assert values["peak_memory_bytes"] > 0


def test_earlier_runs_of_the_process_change_nothing(first_trial, assign):
    other = execute(assign("adalora", evaluate={"max_rows": 5})).values
    assert other is not None
    assert other["test_rows"] == 5
    again = execute(assign("dynamic", trial=True, data="bare"))
    assert first_trial.values is not None
    assert again.values is not None
    for key in ("validation", "final_ranks", "parameters"):
        assert first_trial.values[key] == again.values[key]


@pytest.mark.parametrize(
    ("error", "status", "diverged"),
    [
        (NonFiniteError("nan"), "failed", True),
        (MemoryError(), "out_of_memory", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", False),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 9"), "out_of_memory", False),
    ],
)
def test_the_status_depends_on_the_error(assign, monkeypatch, error, status, diverged):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, "run_job", fail)
    outcome = execute(assign())
    assert (outcome.status, outcome.diverged) == (status, diverged)
    assert outcome.error == f"{type(error).__name__}: {error}"
    assert outcome.values is None


def test_a_huge_learning_rate_diverges_and_warnings_are_notes(assign):
    given = assign(base={"data": {"max_length": 8}})
    training = replace(given.config.training, learning_rate=1e30, max_grad_norm=0.0)
    outcome = execute(replace(given, config=replace(given.config, training=training)))
    assert (outcome.status, outcome.diverged) == ("failed", True), outcome.error
    assert any("longer than data.max_length=8" in note for note in outcome.notes)
