"""The table at the end of a run."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from dynlora.report.summary import RunReport, summary_table
from tests.unit.events import make_event

START = {f"bert.encoder.layer.{n}.attention.self.query": 8 for n in range(5)}
NAMES = list(START)
END = dict(zip(NAMES, (20, 10, 8, 5, 1), strict=True))

REPORT = RunReport(
    method="dynamic",
    before={"loss": 0.7, "accuracy": 0.5, "f1": 0.25, "matthews": 0.0},
    after={"loss": 0.4, "accuracy": 0.825, "f1": 0.75, "matthews": 0.5},
    budget=1000,
    parameters=990,
    peak_parameters=1000,
    initial_ranks=START,
    final_ranks=END,
    events=(make_event(3, START, END, scores=dict.fromkeys(START, 1.0)), make_event(6, END, END)),
    train_seconds=20.0,
    dynamic_seconds=0.25,
    places={"adapter": Path("runs/one/adapter")},
)


def shown(report: RunReport, *, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(summary_table(report))
        return console.export_text()


def row(text: str, label: str) -> str:
    """Return the cell beside a label, with the lines below it that have no label."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"│ {label} "))
    cells = [lines[start].split("│")[2].strip()]
    for line in lines[start + 1 :]:
        if not line.startswith("│  "):
            break
        cells.append(line.split("│")[2].strip())
    return "\n".join(" ".join(cell.split()) for cell in cells)


def test_metrics_are_shown_alone_where_there_are_none_from_before() -> None:
    text = shown(dataclasses.replace(REPORT, before={}))
    assert row(text, "validation accuracy") == "0.8250"


def test_metrics_are_shown_before_and_after_with_the_change() -> None:
    text = shown(REPORT)
    assert row(text, "validation accuracy") == "0.5000 → 0.8250 (+0.3250)"
    assert row(text, "validation loss") == "0.7000 → 0.4000 (-0.3000)"


def test_parameters_stand_against_the_budget_and_the_peak_where_it_differs() -> None:
    text = shown(REPORT)
    assert row(text, "live LoRA parameters") == "990 of the budget of 1,000 (99.0%)"
    assert row(text, "at their peak") == "1,000"
    assert "peak" not in shown(dataclasses.replace(REPORT, peak_parameters=990))


def test_ranks_are_summed_up_and_the_layers_that_moved_most_are_named() -> None:
    text = shown(REPORT)
    assert row(text, "ranks") == "lowest 1, median 8, highest 20"
    assert row(text, "ranks moved") == "at 1 of 2 events: 2 layers up, 2 down"
    assert row(text, "gained most") == (
        "0.attention.self.query 8 → 20\n1.attention.self.query 8 → 10"
    )
    assert row(text, "lost most") == "4.attention.self.query 8 → 1\n3.attention.self.query 8 → 5"


def test_at_most_three_layers_are_named_on_each_side() -> None:
    start = {f"m.{n}.q": 8 for n in range(20)}
    end = {name: 8 + n - 10 for n, name in enumerate(start)}
    events = (make_event(1, start, end),)
    text = shown(dataclasses.replace(REPORT, initial_ranks=start, final_ranks=end, events=events))
    assert row(text, "gained most") == "19.q 8 → 17\n18.q 8 → 16\n17.q 8 → 15"
    assert row(text, "lost most") == "0.q 8 → -2\n1.q 8 → -1\n2.q 8 → 0"


def test_where_nothing_moved_the_table_says_why_and_names_no_layer() -> None:
    still = dataclasses.replace(REPORT, final_ranks=START, events=(make_event(3, START, START),))
    text = shown(still)
    assert "beyond chance" in row(text, "ranks did not move")
    assert "gained most" not in text


def test_the_dynamic_part_is_shown_as_a_share_of_training() -> None:
    text = shown(REPORT)
    assert row(text, "training steps") == "20.0 s"
    assert row(text, "of it dynamic part") == "0.25 s (1.25%)"
    assert row(shown(dataclasses.replace(REPORT, train_seconds=0.0)), "training steps") == "0.0 s"


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_methods_without_moving_ranks_show_neither_ranks_nor_a_dynamic_part(method: str) -> None:
    plain = dataclasses.replace(
        REPORT, method=method, initial_ranks={}, final_ranks={}, events=(), dynamic_seconds=0.0
    )
    text = shown(plain)
    assert "ranks" not in text
    assert "dynamic part" not in text


def test_full_training_shows_its_parameters_without_a_budget() -> None:
    full = dataclasses.replace(
        REPORT, method="full", parameters=5000, budget=5000, final_ranks={}, events=()
    )
    text = shown(full)
    assert row(text, "trained parameters") == "5,000"
    assert "budget" not in text


def test_a_path_is_shown_whole_even_with_brackets_and_on_a_narrow_terminal() -> None:
    path = Path("/somewhere") / ("very-" * 20 + "deep") / "[red] run" / "adapter"
    text = shown(dataclasses.replace(REPORT, places={"adapter": path}))
    cells = [line.split("│")[2].strip() for line in text.splitlines() if line.count("│") == 3]
    assert str(path).replace(" ", "") in "".join(cells).replace(" ", "")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(len(line) for line in shown(REPORT, width=width).splitlines()) <= width


def test_a_typical_report_needs_no_wrapping_at_80_columns() -> None:
    labels = [line.split("│")[1].strip() for line in shown(REPORT).splitlines() if "│" in line]
    assert labels.count("") == 2, "only the second layers that gained and lost have no label"
