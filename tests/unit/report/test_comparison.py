"""Runs side by side: ranks, settings, and why runs cannot be compared."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dynlora.errors import RunFileError
from dynlora.report.comparison import Comparison, compare_runs, read_finished
from dynlora.report.comparison_table import comparison_table
from dynlora.runs.reader import RunFiles
from tests.unit.report.runs import config_values, run_values, write_run


def made(folder: Path, name: str, **changes: object) -> RunFiles:
    config = changes.pop("config", None)
    return read_finished(write_run(folder / name, run=run_values(**changes), config=config))


def shown(found: Comparison, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison_table(found))
    return console.file.getvalue()


def cells(text: str, name: str) -> list[str]:
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
    return next(row[2:-1] for row in rows if len(row) > 2 and row[1] == name)


def test_a_run_differs_from_itself_in_nothing(tmp_path: Path) -> None:
    run = made(tmp_path, "one", final_ranks={"a": 4})
    found = compare_runs([run, run])
    assert (found.settings, found.warnings) == ({}, ())
    assert [(layer.ranks, layer.difference) for layer in found.layers] == [((4, 4), 0)]
    text = shown(found)
    assert "no layer that two runs share has another rank" in text
    assert cells(text, "loss after") == ["0.5000", "0.5000 (0.0000)"]
    assert text.count("/one") == 2, "one name for two columns would not tell them apart"


def test_layers_come_with_the_largest_difference_first(tmp_path: Path) -> None:
    one = made(tmp_path, "one", final_ranks={"m.0.q": 8, "m.0.k": 8, "m.1.q": 8, "m.1.k": 1})
    two = made(tmp_path, "two", final_ranks={"m.0.q": 9, "m.0.k": 2, "m.1.q": 8, "x": 70})
    three = made(tmp_path, "three", final_ranks={"m.0.q": 4})
    found = compare_runs([one, two, three])
    assert [(layer.name, layer.ranks, layer.difference) for layer in found.layers] == [
        ("m.0.k", (8, 2, None), 6),
        ("m.0.q", (8, 9, 4), 5),
        ("m.1.q", (8, 8, None), 0),
        ("m.1.k", (1, None, None), 0),
        ("x", (None, 70, None), 0),
    ]
    text = shown(found)
    assert "ranks that differ most, 2 of 2 layers" in text
    assert cells(text, "0.k") == ["8", "2", "–"]


def test_the_table_has_ten_layers_and_json_has_all(tmp_path: Path) -> None:
    names = [f"m.{n}.q" for n in range(30)]
    one = made(tmp_path, "one", final_ranks=dict.fromkeys(names, 8))
    two = made(tmp_path, "two", final_ranks={name: 9 + n for n, name in enumerate(names)})
    found = compare_runs([one, two])
    assert "ranks that differ most, 10 of 30 layers" in shown(found)
    assert sum(".q" in line for line in shown(found).splitlines()) == 10
    ranks = found.to_dict()["ranks"]
    assert len(ranks) == 30
    assert ranks[0] == {"layer": "m.29.q", "ranks": [8, 38], "difference": 30}


def test_metrics_of_any_name_stand_side_by_side(tmp_path: Path) -> None:
    one = made(tmp_path, "one", metrics_after={"perplexity": 12.5, "loss": 0.5})
    two = made(tmp_path, "two", metrics_after={"perplexity": 10.0, "macro_f1": 0.25})
    text = shown(compare_runs([one, two]))
    assert cells(text, "perplexity after") == ["12.5000", "10.0000 (−2.5000)"]
    assert cells(text, "macro_f1 after") == ["–", "0.2500"]
    assert cells(text, "parameters") == ["9,876", "9,876"]
    assert cells(text, "at their peak") == ["10,000", "10,000"]
    assert cells(text, "training steps") == ["20.0 s", "20.0 s"]
    assert cells(text, "peak memory") == ["3.00 GiB", "3.00 GiB"]


def test_settings_that_differ_are_told_by_dotted_key(tmp_path: Path) -> None:
    one = made(tmp_path, "one")
    config = config_values(output="elsewhere", lora={"r": 4, "lora_alpha": 16.0, "new": None})
    found = compare_runs([one, made(tmp_path, "two", config=config)])
    assert found.settings == {"lora.r": (8, 4), "lora.new": ("(not a setting)", None)}
    assert cells(shown(found), "lora.r") == ["8", "4"]
    assert cells(shown(found), "lora.new")[1] == "null"


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rows": {"train": 40}}, "other rows: 400 train, 100 validation against 40 train"),
        ({"rows": {"train": None}}, "other rows: 400 train, 100 validation against unknown train"),
        ({"steps": 50}, "other number of steps: 100 against 50"),
        ({"seed": 7}, "other seeds: 0 against 7"),
        ({"machine": {"cpus": 64}}, "other machines: seconds and memory"),
        (
            {"config": config_values(model={"name": "an/other", "path": None})},
            "other model: model.name is some/model against an/other",
        ),
        (
            {"config": config_values(data={"path": "rows", "text": "body"})},
            "other data: data.text is text against body",
        ),
    ],
)
def test_what_makes_runs_incomparable_is_one_line(
    tmp_path: Path, changes: dict[str, object], warning: str
) -> None:
    found = compare_runs([made(tmp_path, "one"), made(tmp_path, "two", **changes)])
    assert len(found.warnings) == 1
    assert found.warnings[0].startswith(warning)
    assert f"not comparable, {warning}" in " ".join(shown(found).split())


def test_a_setting_that_an_older_version_did_not_know_is_no_other_task(tmp_path: Path) -> None:
    newer = made(tmp_path, "two", config=config_values(task="regression"))
    found = compare_runs([made(tmp_path, "one"), newer])
    assert found.warnings == ()
    assert "task" in found.settings
    other = made(tmp_path, "three", config=config_values(task="tokens"))
    assert compare_runs([newer, other]).warnings == (
        "other task: task is regression against tokens",
    )


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_only_finished_runs_can_be_compared(tmp_path: Path, status: str) -> None:
    root = write_run(tmp_path / "run", run=run_values(status=status, steps=None))
    with pytest.raises(RunFileError, match=r"must be finished, got .* after 100 steps"):
        read_finished(root)


def test_markup_in_names_is_printed_as_it_is(tmp_path: Path) -> None:
    one = made(tmp_path, "[red]one", final_ranks={"[bold]a": 4, "b": 1})
    two = made(tmp_path, "[i]two", final_ranks={"[bold]a": 5, "b": 1}, method="[blue]")
    text = shown(compare_runs([one, two]))
    for name in ("[red]one", "[i]two", "[bold]a", "[blue]"):
        assert name in text
