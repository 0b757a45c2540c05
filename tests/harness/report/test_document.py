"""The document: what stands in it for invented studies whose numbers are known."""

import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

from benchmarks.harness.report.document import make_document
from benchmarks.harness.report.record import as_record
from benchmarks.harness.report.study import group
from dynlora.errors import ConfigError
from tests.harness.report.records import invented_study, layers, values


def text_of(*runs: dict, reference: str | None = None) -> str:
    records = [as_record(Path(f"{run['study']}/{n}.json"), run) for n, run in enumerate(runs)]
    return make_document(group(records), reference, "results").text


def rows(text: str, first: str) -> list[list[str]]:
    """Return the cells of every row that begins with a word."""
    found = re.findall(rf"^\| {re.escape(first)} .*$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in found]


def section(text: str, title: str) -> str:
    """Return what stands below a heading, up to the next one."""
    return re.split(r"^#", text.split(f"# {title}\n", 1)[1], flags=re.MULTILINE)[0]


LOSSES = {"lora": [0.5, 0.6, 0.7], "dynamic": [0.4, 0.45, 0.65]}
RUNS = [
    values(method=method, seed=seed, loss=loss, accuracy=1.3 - loss, collapsed=seed == 1,
           parameters={"start": 1_000, "peak": 2_000, "end": 1_500})
    for method, found in LOSSES.items()
    for seed, loss in enumerate(found)
]  # fmt: skip


def test_a_cells_table_holds_means_spreads_and_costs():
    found = rows(section(text_of(*RUNS), "mrpc with minilm, budget 8"), "dynamic")
    loss = LOSSES["dynamic"]
    assert found[0] == [
        "dynamic", "3 of 3", f"{fmean(loss):.4f} ± {stdev(loss):.4f}",
        f"{1.3 - fmean(loss):.4f} ± {stdev(loss):.4f}", "1,500", "2,000", "1",
    ]  # fmt: skip
    assert found[1] == [
        "dynamic", "validation loss", "lower", "3", "−0.1000", "–", "0.2500", "0.2500",
        "no difference shown",
    ]  # fmt: skip
    assert found[2][1:5] == ["validation accuracy", "higher", "3", "+0.1000"]


def test_collapsed_runs_are_named_and_stay_in_the_mean():
    text = section(text_of(*RUNS), "mrpc with minilm, budget 8")
    assert "- Collapsed to one class: lora, seed 1." in text
    assert "- Collapsed to one class: dynamic, seed 1." in text
    assert rows(text, "lora")[0][2].startswith("0.6000")


def test_a_run_that_nobody_looked_at_is_not_said_not_to_have_collapsed():
    assert rows(text_of(values(collapsed=None, tuned=None)), "lora")[1][-1] == "–"


def test_a_run_that_is_not_finite_is_named_and_in_no_mean():
    bad = {**values(method="dynamic", seed=3), "validation": {"loss": None, "accuracy": 0.99}}
    text = section(text_of(*RUNS, bad), "mrpc with minilm, budget 8")
    assert "not finite, and left out: dynamic, seed 3." in text
    assert rows(text, "dynamic")[0][1:4] == ["3 of 4", *rows(text_of(*RUNS), "dynamic")[-3][2:4]]
    assert "nan" not in text


def test_lost_pairs_stand_beside_those_that_count():
    failed = [values(method=method, seed=3, status="failed") for method in LOSSES]
    text = section(text_of(*RUNS, *failed), "mrpc with minilm, budget 8")
    assert rows(text, "dynamic")[1][3] == "3 (1 lost)"


def test_the_reference_stands_first_and_is_compared_with_nothing():
    text = section(text_of(*RUNS), "mrpc with minilm, budget 8")
    assert text.index("| lora ") < text.index("| dynamic ")
    assert len(rows(text, "lora")) == 1


def test_runs_that_did_not_complete_are_named_with_their_error_once_for_all_seeds():
    failed = [
        values(method="dynamic", seed=seed, status="failed", error="no *luck*\n", diverged=True)
        for seed in (9, 8)
    ]
    lost = values(method="dynamic", seed=7, status="out_of_memory")
    text = section(text_of(*RUNS, *failed, lost), "Runs")
    lead = "- dynamic, minilm, mrpc, budget 8, seed"
    assert rf"{lead}s 8, 9: failed (diverged): no \*luck\*" in text
    assert f"{lead} 7: out of memory\n" in text
    assert rows(text, "dynamic") == [["dynamic", "3", "2", "1"]]
    assert rows(text, "lora") == [["lora", "3", "0", "0"]]


def test_tuned_values_stand_with_the_number_of_trials():
    trials = [values(kind="trial", key=str(n)) for n in range(5)]
    trials.append(values(kind="trial", key="x", status="failed", error="diverged"))
    text = text_of(values(tuned={"learning_rate": 2.5e-3, "scale": 4.0}), *trials)
    assert rows(section(text, "mrpc with minilm"), "lora") == [["lora", "0.0025, 4, 5 of 6"]]
    assert rows(section(text, "Runs"), "lora") == [["lora", "1", "0", "6"]]
    assert "- a trial of lora, minilm, mrpc, budget 8, seed 0: failed: diverged" in text


def test_tuned_values_at_the_edge_of_what_was_tried_are_marked():
    chosen = {"learning_rate": 2.5e-3, "scale": 1.0}
    tried = [chosen, {"learning_rate": 1e-3, "scale": 2.0}, {"learning_rate": 2e-3, "scale": 0.5}]
    trials = [values(kind="trial", key=str(n), tuned=one) for n, one in enumerate(tried)]
    text = section(text_of(values(tuned=chosen), *trials), "mrpc with minilm")
    assert rows(text, "lora") == [["lora", "0.0025↑, 1, 3"]]
    assert "↑ and ↓ are the highest and the lowest value that was tried" in text


def test_a_study_without_tuning_has_no_such_table():
    assert "Tuned" not in text_of(values(tuned=None))


def test_a_study_of_trials_alone_says_what_was_run():
    text = text_of(values(kind="trial"), values(kind="trial", key="2", seed=1))
    assert rows(section(text, "Runs"), "lora") == [["lora", "0", "2"]]


def test_the_description_stands_above_the_tables_as_it_was_written():
    text = text_of(*(run | {"description": "Does it *help*?\n\nA second part."} for run in RUNS))
    assert "## first\n\nDoes it *help*?\n\nA second part.\n\n### Runs" in text


def test_the_summary_counts_cells_and_turns_gains_one_way():
    made = invented_study(methods=("lora", "dynamic"), budgets=(2, 4, 8), seeds=9, blocks=0)
    found = rows(section(text_of(*made), "Summary of first"), "dynamic")
    assert [row[1] for row in found] == [
        "validation loss",
        "validation metric",
        "test loss",
        "test metric",
    ]
    for row in found:
        # Nine pairs of one sign: p = 2 / 512, times three cells.
        assert row[2:8] == ["3", "3", "0", "0", "3", "0"]
        assert row[8].startswith("+0.0")
        assert row[-2:] == ["0.0039", "better"]


def test_the_summary_says_where_no_cell_could_show_anything():
    text = section(text_of(*RUNS), "Summary of first")
    assert (
        "- Too few pairs for any difference to be shown after the correction: 1 of 1 comparisons "
        "in validation loss, validation metric." in text
    )
    enough = invented_study(methods=("lora", "dynamic"), budgets=(8,), seeds=8, blocks=0)
    assert "Too few pairs" not in section(text_of(*enough), "Summary of first")


def test_a_cell_of_many_pairs_does_not_hide_that_others_have_too_few():
    many = invented_study(methods=("lora", "dynamic"), budgets=(8,), seeds=10, blocks=0)
    few = invented_study(methods=("lora", "dynamic"), budgets=(2,), seeds=3, blocks=0)
    text = section(text_of(*many, *few), "Summary of first")
    assert "after the correction: 1 of 2 comparisons in validation loss" in text


def test_a_method_is_set_against_the_reference_at_the_next_higher_budget():
    runs = [
        values(method="lora", budget=budget, seed=seed, loss=0.5 - 0.01 * budget + 0.001 * seed)
        for budget in (2, 4, 16)
        for seed in range(7)
    ]
    runs += [
        values(method="a", budget=2, seed=seed, loss=0.45 if seed < 5 else 0.5)
        for seed in range(1, 7)
    ]
    runs.append(values(method="a", budget=2, seed=0, loss=float("nan")))
    runs.append(values(method="a", budget=8, seed=0, loss=0.3))
    found = rows(text_of(*runs).split("what rank a method is worth.")[1], "a")
    expected = [0.45 - 0.46 - 0.001 * s for s in range(1, 5)] + [0.04 - 0.005, 0.04 - 0.006]
    loss = next(row for row in found if row[1:4] == ["validation loss", "lower", "2"])
    assert loss[4:6] == [
        "4",
        "6 (1 lost)",
    ]  # the next at which the reference was run, and common seeds
    assert loss[6] == f"+{fmean(expected):.4f}"
    assert loss[8] == "4"
    assert re.fullmatch(r"[−+]0\.\d{4} to \+0\.\d{4}", loss[7])
    one_pair = next(row for row in found if row[1:4] == ["validation loss", "lower", "8"])
    assert one_pair[4:] == ["16", "1", "−0.0400", "–", "1"]


def test_without_a_higher_budget_of_the_reference_there_is_no_such_table():
    runs = [values(method="lora", budget=2), values(method="a", budget=2, loss=0.4)]
    assert "what rank a method is worth" not in text_of(*runs)


def test_the_agreement_of_ranks_stands_for_each_budget():
    names = layers(1)
    patterns = {"lora": [[4, 4, 4, 4]] * 2, "dynamic": [[1, 2, 3, 4], [2, 4, 6, 8]]}
    runs = [
        values(method=method, seed=seed, final_ranks=dict(zip(names, ranks, strict=True)))
        for method, found in patterns.items()
        for seed, ranks in enumerate(found)
    ]
    text = text_of(*runs).split("Agreement of final ranks")[1]
    assert rows(text, "lora") == [["lora", "all equal"]]
    assert rows(text, "dynamic") == [["dynamic", "1.00, W 1.00"]]


def test_a_reference_that_is_in_no_study_is_refused():
    with pytest.raises(ConfigError, match="got 'x': the records hold dynamic, lora"):
        text_of(*RUNS, reference="x")


def test_headings_are_all_different():
    made = [*invented_study("a", tasks=("t", "u"), seeds=1), *invented_study("b", seeds=1)]
    text = text_of(*made)
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Summary", "## a", "## b"]
    below = [line for line in text.split("## b")[0].splitlines() if line.startswith("###")]
    assert len(set(below)) == len(below)
