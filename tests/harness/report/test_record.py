"""Records: what is read, and what is refused with its key, value and file."""

import math
from pathlib import Path

import pytest

from benchmarks.harness.report.record import Cell, Tuned, as_record
from dynlora.errors import RunFileError
from tests.harness.report.records import values

PATH = Path("results/first/0.json")


def test_a_completed_run_is_read_as_it_was_written():
    found = as_record(
        PATH,
        values(
            loss=0.4,
            accuracy=0.8,
            test={"loss": 0.5, "accuracy": 0.7},
            collapsed=True,
            parameters={"start": 10, "peak": 30, "end": 20},
            final_ranks={"a": 3},
        ),
    )
    assert (found.study, found.cell, found.method) == ("first", Cell("minilm", "mrpc", 8), "lora")
    assert found.tuned == Tuned(learning_rate=3e-4, scale=2.0)
    outcome = found.outcome
    assert outcome
    assert (outcome.loss, outcome.metric, outcome.test, outcome.collapsed) == (0.4, 0.8, 0.7, True)
    assert (outcome.peak, outcome.live) == (30, 20)
    assert outcome.final_ranks == {"a": 3}
    assert outcome.is_finite


@pytest.mark.parametrize("loss", [None, math.nan, math.inf])
def test_a_loss_that_is_no_number_makes_a_run_that_is_not_finite(loss):
    run = values()
    run["validation"] = {"loss": loss, "accuracy": 0.7}
    outcome = as_record(PATH, run).outcome
    assert outcome
    assert not outcome.is_finite


@pytest.mark.parametrize("status", ["failed", "out_of_memory", "interrupted", "running"])
def test_a_run_that_did_not_complete_needs_no_result(status):
    run = values(status=status, error="out of luck")
    for key in ("validation", "parameters", "main_metric", "final_ranks", "tuned"):
        run[key] = None
    found = as_record(PATH, run)
    assert (found.status, found.error, found.outcome) == (status, "out of luck", None)


def test_a_trial_has_no_outcome():
    assert as_record(PATH, values(kind="trial")).outcome is None


@pytest.mark.parametrize(
    "key",
    ["study", "kind", "model", "task", "method", "budget", "seed", "status", "main_metric",
     "validation", "parameters", "final_ranks"],
)  # fmt: skip
def test_a_missing_key_is_named_with_the_file(key):
    run = values()
    del run[key]
    with pytest.raises(RunFileError, match=rf"results/first/0.json must hold `{key}`"):
        as_record(PATH, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": {"loss": 1.0}}, "must hold `validation.accuracy`"),
        ({"validation": {"loss": "low", "accuracy": 1}}, "`validation.loss` .* got 'low'"),
        ({"validation": {"loss": True, "accuracy": 1}}, "`validation.loss` .* got 'True'"),
        ({"validation": None}, "`validation` .* must be an object, got 'None'"),
        ({"test": {"loss": 1.0}}, "must hold `test.accuracy`"),
        ({"parameters": {"end": 1}}, "must hold `parameters.peak`"),
        ({"parameters": {"end": 1.5, "peak": 2}}, "`parameters.end` .* got '1.5'"),
        ({"final_ranks": {"a": -1}}, "`final_ranks.a` .* at least 0, got '-1'"),
        ({"budget": "8"}, "`budget` .* whole number .* got '8'"),
        ({"seed": True}, "`seed` .* whole number .* got 'True'"),
        ({"status": "fine"}, "one of completed, failed, .* got 'fine'"),
        ({"kind": ["final"]}, "one of final, trial, got"),
        ({"method": " "}, "`method` .* name of printable characters, got ' '"),
        ({"task": "a\nb"}, "`task` .* name of printable characters"),
        ({"model": "a\ud800"}, "`model` .* name of printable characters"),
        ({"collapsed": "yes"}, "`collapsed` .* true, false or null, got 'yes'"),
        ({"error": 3}, "`error` .* a text or null, got '3'"),
        ({"tuned": {"learning_rate": 1.0}}, "must hold `tuned.scale`"),
    ],
)
def test_a_value_of_another_kind_is_named_with_key_and_place(change, message):
    with pytest.raises(RunFileError, match=message):
        as_record(PATH, values(**change))


def test_a_description_keeps_its_lines_and_loses_what_cannot_be_printed():
    found = as_record(PATH, values(description="  one\x07\n\ntwo\n"))
    assert found.description == "one \n\ntwo"
