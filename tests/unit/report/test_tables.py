"""Tables in the terminal: the results of a run and a comparison of runs; numbers as text."""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from dynlora.history import Event
from dynlora.report import wording
from dynlora.report.page import report_page
from dynlora.report.results import result_table
from dynlora.report.run_comparison import (
    RunComparison,
    compare_runs,
    comparison_table,
    read_finished,
)
from dynlora.report.wording import (
    bytes_text,
    metric_text,
    seconds_text,
    shorten,
    verdict,
)
from dynlora.runs.reader import RunFiles
from dynlora.train.config import METRICS
from tests.unit.events import make_event
from tests.unit.report.runs import config_values, run_values, write_run

START = {f"bert.encoder.layer.{n}.attention.self.query": 8 for n in range(9)}
END = dict(zip(START, (20, 10, 9, 9, 8, 7, 6, 5, 1), strict=True))
GAINED, LOST = ((0, 20), (1, 10), (2, 9)), ((8, 1), (7, 5), (6, 6))
"""Block and last rank of the layers in the table, at most three per side."""
RESULT = {
    "method": "dynamic",
    "before": {"loss": 0.7, "accuracy": 0.5},
    "after": {"loss": 0.4, "accuracy": 0.825},
    "budget": 1000,
    "parameters": 990,
    "peak_parameters": 1000,
    "other_parameters": 1234,
    "lost_by_search": None,
    "initial_ranks": START,
    "final_ranks": END,
    "train_seconds": 20.0,
    "dynamic_seconds": 0.25,
    "places": {"adapter": "runs/one/adapter"},
}
EVENTS = (make_event(3, START, END, scores=dict.fromkeys(START, 1.0)), make_event(6, END, END))


def printed(table: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def cells(text: str, label: str) -> list[str]:
    """Return the cells beside a label, with the lines below it that have no label."""
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    start = next(n for n, row in enumerate(rows) if len(row) > 2 and row[1] == label)
    found = rows[start][2:-1]
    for row in rows[start + 1 :]:
        if len(row) < 3 or row[1]:
            break
        found = [f"{one}\n{more}" for one, more in zip(found, row[2:-1], strict=True)]
    return found


def changed(events: Sequence[Event] = EVENTS, **values: object) -> str:
    return printed(result_table(RESULT | values, events), 80)


def test_the_results_contain_metrics_parameters_ranks_and_times() -> None:
    text = changed()
    expected = {
        "validation accuracy": "0.5000 → 0.8250 (+0.3250)",
        "validation loss": "0.7000 → 0.4000 (-0.3000)",
        "LoRA parameters": "990 of the budget of 1,000 (99.0%)",
        "at their peak": "1,000",
        "also trained": "1,234",
        "ranks": "lowest 1, median 8, highest 20",
        "ranks moved": "at 1 of 2 events: 4 layers up, 4 down",
        "gained most": "\n".join(f"{n}.attention.self.query  8 → {r}" for n, r in GAINED),
        "lost most": "\n".join(f"{n}.attention.self.query  8 → {r}" for n, r in LOST),
        "training steps": "20.0 s",
        "of it dynamic part": "0.25 s (1.25%)",
        "adapter": "runs/one/adapter",
    }
    assert {label: cells(text, label) for label in expected} == {
        label: [cell] for label, cell in expected.items()
    }
    assert cells(changed(before={}), "validation accuracy") == ["0.8250"]
    assert "peak" not in changed(peak_parameters=990)
    assert cells(changed(train_seconds=0.0), "training steps") == ["0.0 s"]


def test_a_searched_budget_is_answered_in_a_sentence() -> None:
    assert "needed ranks" not in changed()
    said = cells(changed(lost_by_search=0.004, parameters=250), "needed ranks")[0]
    assert said.replace("\n", " ") == (
        "ranks of 25.0% of the parameters are enough: the cuts changed the validation loss by "
        "+0.4% of its reduction"
    )
    ones = dict.fromkeys(END, 1)
    assert "rank 1 is enough in every layer" in changed(lost_by_search=0.0, final_ranks=ones)


def test_unmoved_ranks_are_explained_and_fixed_ones_not_shown() -> None:
    text = changed(final_ranks=START, events=(make_event(3, START, START),))
    assert "beyond chance" in cells(text, "ranks did not move")[0]
    assert "gained most" not in text
    for method in ("lora", "full"):
        text = changed(method=method, initial_ranks={}, final_ranks={}, events=(), parameters=5000)
        assert "ranks" not in text
        assert "dynamic part" not in text
        assert ("trained parameters" in text) == (method == "full") == ("budget" not in text)


def test_sentences_are_wrapped_so_that_the_table_fits_100_columns() -> None:
    still = result_table(RESULT | {"final_ranks": START}, (make_event(3, START, START),))
    assert max(map(len, printed(still, 300).splitlines())) <= 100


def test_a_path_is_shown_whole_and_no_line_is_wider_than_the_terminal() -> None:
    path = Path("/somewhere") / ("very-" * 20 + "deep") / "[red]run" / "adapter"
    text = printed(result_table(RESULT | {"places": {"adapter": str(path)}}, EVENTS), 60)
    assert "".join(cells(text, "adapter")[0].split()) == str(path)
    assert max(map(len, text.splitlines())) <= 60


def made(folder: Path, name: str, **changes: object) -> RunFiles:
    config = changes.pop("config", None)
    return read_finished(write_run(folder / name, run=run_values(**changes), config=config))


def shown(found: RunComparison) -> str:
    return printed(comparison_table(found))


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    run = made(tmp_path, "one", final_ranks={"a": 4})
    found = compare_runs([run, run])
    assert (found.settings, found.warnings, found.ranks) == ({}, (), {"a": (4, 4)})
    text = shown(found)
    assert "no layer that two runs share has another rank" in text
    assert cells(text, "loss after") == ["0.5000", "0.5000 (0.0000)"]
    assert text.count("/one") == 2, "two equal names are told apart by their paths"


def test_layers_come_with_the_largest_difference_first_and_the_table_has_ten(
    tmp_path: Path,
) -> None:
    many = {f"n.{n}.q": 1 for n in range(20)}
    one = made(tmp_path, "one", final_ranks={"m.0.q": 8, "m.0.k": 30, "m.1.q": 8} | many)
    more = {name: rank + 1 for name, rank in many.items()}
    two = made(tmp_path, "two", final_ranks={"m.0.q": 9, "m.0.k": 2, "x": 70} | more)
    three = made(tmp_path, "three", final_ranks={"m.0.q": 4})
    found = compare_runs([one, two, three])
    ranks = list(found.ranks.items())
    assert ranks[:2] == [("m.0.k", (30, 2, None)), ("m.0.q", (8, 9, 4))]
    assert ranks[-2:] == [("m.1.q", (8, None, None)), ("x", (None, 70, None))]
    text = shown(found)
    assert "ranks that differ most, 10 of 22 layers" in text
    assert cells(text, "m.0.k") == ["30", "2", "–"]
    assert len(re.findall(r"\.[qk] ", text)) == 10
    listed = found.to_dict()["ranks"]
    assert len(listed) == 24
    assert listed[0] == {"layer": "m.0.k", "ranks": [30, 2, None], "difference": 28}


def test_metrics_costs_and_settings_stand_side_by_side_with_markup_as_text(tmp_path: Path) -> None:
    config = config_values(output="elsewhere", lora={"r": 4, "lora_alpha": 16.0, "new": None})
    one = made(tmp_path, "[red]one", metrics_after={"perplexity": 12.5}, method="[blue]")
    two = made(tmp_path, "two", metrics_after={"perplexity": 10.0, "[i]f1": 0.25}, config=config)
    found = compare_runs([one, two])
    assert found.settings == {"lora.r": (8, 4), "lora.new": ("(not a setting)", None)}
    text = shown(found)
    assert "[red]one" in text
    for label, expected in {
        "method": ["[blue]", "dynamic"],
        "perplexity after": ["12.5000", "10.0000 (−2.5000)"],
        "[i]f1 after": ["–", "0.2500"],
        "parameters": ["9,876", "9,876"],
        "at their peak": ["10,000", "10,000"],
        "training steps": ["20.0 s", "20.0 s"],
        "peak memory": ["3.00 GiB", "3.00 GiB"],
        "lora.r": ["8", "4"],
        "lora.new": ["(not a setting)", "null"],
    }.items():
        assert cells(text, label) == expected


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rows": {"train": None}}, "other rows: 400 train, 100 validation against unknown train"),
        ({"steps": 50}, "other number of steps: 100 against 50"),
        ({"machine": {"cpus": 64}}, "other machines: seconds and memory"),
        (
            {"config": config_values(model={"name": "an/other", "path": None})},
            "other model: model.name is some/model against an/other",
        ),
    ],
)
def test_each_unequal_condition_is_one_warning(
    tmp_path: Path, changes: dict[str, object], warning: str
) -> None:
    found = compare_runs([made(tmp_path, "one"), made(tmp_path, "two", **changes)])
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(warning)
    assert f"not comparable, {warning}" in " ".join(shown(found).split())


def test_a_setting_that_an_older_version_did_not_know_is_no_other_task(tmp_path: Path) -> None:
    newer = made(tmp_path, "two", config=config_values(task="regression"))
    found = compare_runs([made(tmp_path, "one"), newer])
    assert (found.warnings, "task" in found.settings) == ((), True)
    other = made(tmp_path, "three", config=config_values(task="tokens"))
    assert compare_runs([newer, other]).warnings == (
        "other task: task is regression against tokens",
    )


def test_errors_improve_by_falling_and_other_metrics_by_rising() -> None:
    assert {metric for metrics in METRICS.values() for metric in metrics} == {*wording.METRICS}
    changes = [("rmse", 0.5, 0.7), ("pearson", 0.5, 0.4), ("loss", 0.7, 0.5), ("f1", 0.5, 0.7)]
    judged = [verdict(name, {name: before}, {name: after}) for name, before, after in changes]
    assert judged == ["worse", "worse", "better", "better"]
    for before, after in ((0.5, 0.5), (None, 0.5), (0.5, math.nan)):
        assert verdict("f1", {"f1": before}, {"f1": after}) == ""


@pytest.mark.parametrize(
    "random",
    [
        {"loss": 0.7, "accuracy": 0.68, "f1": 0.81, "matthews": 0.0},  # all rows got one class
        {"loss": 0.7, "accuracy": 0.5, "f1": 0.5, "matthews": 0.0},  # labels 0011, predictions 0101
    ],
)
def test_predictions_without_correlation_are_called_chance_and_only_their_loss_is_judged(
    tmp_path: Path, random: dict[str, float]
) -> None:
    learned = {"loss": 0.5, "accuracy": 0.75, "f1": 0.83, "matthews": 0.4}
    for before, after in ((random, learned), (learned, random)):
        assert [verdict(name, before, after) for name in ("accuracy", "f1")] == ["", ""]
    assert verdict("loss", random, learned) == "better"
    assert "no better than chance" in printed(result_table(RESULT | {"after": random}, EVENTS))
    assert "no better than chance" not in printed(result_table(RESULT | {"after": learned}, EVENTS))
    fine = made(tmp_path, "one", metrics_after=learned)
    other = made(tmp_path, "two", metrics_after=random)
    assert "no better than chance" in printed(comparison_table(compare_runs([fine, other])))
    assert "no better than chance" not in printed(comparison_table(compare_runs([fine, fine])))
    page = report_page(other)
    assert "After training, predictions are no better than chance" in page
    assert "same class" not in page


def test_numbers_have_units_and_few_digits() -> None:
    values = [0.5, -0.00004, 123456.78, 3.2e9, None, math.inf]
    assert [metric_text(value) for value in values] == [
        "0.5000", "-0.0000", "123,456.8", "3.200e+09", "not a number", "not a number",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.5, 77.79, 119.4, 150, 7325, None)] == [
        "0.50 s", "77.8 s", "119.4 s", "2 min 30 s", "2 h 02 min", "unknown",
    ]  # fmt: skip
    assert [bytes_text(b) for b in (2**20, 3 * 2**30, None)] == ["1.0 MiB", "3.00 GiB", "none"]
    assert (shorten("abcdefghij", 10), shorten("abcdefghijk", 10)) == ("abcdefghij", "abcd…ghijk")
