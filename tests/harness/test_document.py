"""The document on invented studies with known numbers, and its tables and texts."""

import itertools
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.report.agreement import agreement
from benchmarks.harness.report.document import make_document
from benchmarks.harness.report.markdown import (
    MOST_OF_ERROR,
    error_text,
    escape,
    p_text,
    signed_text,
    spread_text,
    table,
)
from benchmarks.harness.report.results import group, read_result
from tests.harness.records import invented_study, layers, values


def text_of(*runs: dict) -> str:
    results = [read_result(Path(f"{run['study']}/{n}.json"), run) for n, run in enumerate(runs)]
    return make_document(group(results), None, "results").text


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


def test_the_table_of_a_cell_contains_means_spreads_and_costs():
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


def test_collapsed_lost_and_non_finite_runs_are_named():
    text = section(text_of(*RUNS), "mrpc with minilm, budget 8")
    assert "- Collapsed to one class: dynamic, seed 1." in text
    assert rows(text, "lora")[0][2].startswith("0.6000"), "they stay in the mean"
    bad = {**values(method="dynamic", seed=3), "validation": {"loss": None, "accuracy": 0.99}}
    text = section(text_of(*RUNS, bad), "mrpc with minilm, budget 8")
    assert "not finite, and left out: dynamic, seed 3." in text
    assert rows(text, "dynamic")[0][1:4] == ["3 of 4", *rows(text_of(*RUNS), "dynamic")[-3][2:4]]
    assert "nan" not in text
    failed = [
        values(method=method, seed=seed, status="failed", error="no *luck*\n", diverged=True)
        for method in LOSSES
        for seed in (9, 8)
    ]
    lost = values(method="dynamic", seed=7, status="out_of_memory")
    text = text_of(*RUNS, *failed, lost)
    assert rows(section(text, "mrpc with minilm, budget 8"), "dynamic")[1][3] == "3 (2 lost)"
    text = section(text, "Runs")
    lead = "- dynamic, minilm, mrpc, budget 8, seed"
    assert rf"{lead}s 8, 9: failed (diverged): no \*luck\*" in text
    assert f"{lead} 7: out of memory\n" in text
    assert rows(text, "dynamic") == [["dynamic", "3", "2", "1"]]
    assert rows(text, "lora") == [["lora", "3", "2", "0"]]


def test_tuned_values_show_the_number_of_trials_and_the_edge_of_the_space():
    chosen = {"learning_rate": 2.5e-3, "scale": 1.0}
    tried = [chosen, {"learning_rate": 1e-3, "scale": 2.0}, {"learning_rate": 2e-3, "scale": 0.5}]
    trials = [values(kind="trial", key=str(n), tuned=one) for n, one in enumerate(tried)]
    text = section(text_of(values(tuned=chosen), *trials), "mrpc with minilm")
    assert rows(text, "lora") == [["lora", "0.0025↑, 1, 3"]]


def test_the_summary_counts_cells_and_comparisons_with_too_few_pairs():
    made = invented_study(methods=("lora", "dynamic"), budgets=(2, 4, 8), seeds=9, blocks=0)
    found = rows(section(text_of(*made), "Summary of first"), "dynamic")
    quantities = [
        f"{split} {what}" for split in ("validation", "test") for what in ("loss", "metric")
    ]
    assert [row[1] for row in found] == quantities
    for row in found:
        # Nine pairs of one sign: p = 2 / 512, times three cells.
        assert row[2:8] == ["3", "3", "0", "0", "3", "0"]
        assert row[8].startswith("+0.0")
        assert row[-2:] == ["0.0039", "better"]
    few = invented_study(methods=("lora", "dynamic"), budgets=(16,), seeds=3, blocks=0)
    text = section(text_of(*made, *few), "Summary of first")
    assert "after the correction: 1 of 4 comparisons in validation loss" in text


def test_a_method_is_compared_with_the_reference_at_the_next_higher_budget():
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
    # The next budget at which the reference was run, and common seeds.
    assert loss[4:6] == ["4", "6 (1 lost)"]
    assert loss[6] == f"+{fmean(expected):.4f}"
    assert loss[8] == "4"
    assert re.fullmatch(r"[−+]0\.\d{4} to \+0\.\d{4}", loss[7])
    one_pair = next(row for row in found if row[1:4] == ["validation loss", "lower", "8"])
    assert one_pair[4:] == ["16", "1", "−0.0400", "–", "1"]


def test_the_agreement_of_ranks_is_shown_per_budget():
    patterns = {"lora": [[4, 4, 4, 4]] * 2, "dynamic": [[1, 2, 3, 4], [2, 4, 6, 8]]}
    runs = [
        values(method=method, seed=seed, final_ranks=dict(zip(layers(1), ranks, strict=True)))
        for method, found in patterns.items()
        for seed, ranks in enumerate(found)
    ]
    text = text_of(*runs).split("Agreement of final ranks")[1]
    assert rows(text, "lora") == [["lora", "all equal"]]
    assert rows(text, "dynamic") == [["dynamic", "1.00, W 1.00"]]


def patterns(*ranks: list[int]) -> list[dict[str, int]]:
    return [{f"layer.{n}": rank for n, rank in enumerate(row)} for row in ranks]


def test_the_agreement_of_seeds_is_that_of_scipy():
    seeds, layers = 5, 36
    ranks = np.random.default_rng(0).integers(1, 9, (seeds, layers)).tolist()
    found = agreement(patterns(*ranks))
    assert found
    pairs = itertools.combinations(ranks, 2)
    spearman = fmean(float(stats.spearmanr(a, b).statistic) for a, b in pairs)
    assert found.spearman == pytest.approx(spearman)
    # Kendall's W is Friedman's statistic divided by its largest value.
    friedman = stats.friedmanchisquare(*np.array(ranks).T)
    assert found.kendall == pytest.approx(friedman.statistic / (seeds * (layers - 1)))


def test_seeds_with_equal_ranks_have_no_order():
    found = agreement([*patterns([1, 2, 3], [4, 4, 4]), {"layer.2": 4, "layer.0": 1, "layer.1": 2}])
    assert found
    assert (found.constant, found.seeds, found.all_equal) == (1, 3, False)
    assert found.spearman == pytest.approx(1.0), "layers are matched by name"
    found = agreement(patterns([1, 2]))
    assert found
    assert (found.spearman, found.kendall, found.all_equal) == (None, None, False)
    assert agreement([{"a": 1, "b": 2}, {"a": 1, "c": 2}]) is None


def test_a_table_is_aligned_in_any_script():
    assert table(["method", "n"], [["lora", "10"], ["a", "9,999"]]) == [
        "| method |     n |",
        "| ------ | ----: |",
        "| lora   |    10 |",
        "| a      | 9,999 |",
        "",
    ]
    lines = table(["a", "b", "c"], [["方法", "−1", "±"], ["x", "", "–"]], words=2)
    assert {len(line) for n, line in enumerate(lines[:-1]) if n != 2} == {len(lines[2]) + 2}


def test_names_are_escaped_and_numbers_formatted():
    assert escape("dynamic_spectral-2.5 _a_") == r"dynamic_spectral-2.5 \_a\_"
    assert escape("a|b*c`d <b>[x](y)") == r"a\|b\*c\`d \<b\>\[x\](y)"
    assert escape("$x$ ~y~ #1 &amp;\n ! \\") == r"\$x\$ \~y\~ \#1 \&amp; \! \\"
    assert error_text("x" * 1000) == "x" * (MOST_OF_ERROR - 1) + "…"
    assert spread_text([0.4, 0.6]) == "0.5000 ± 0.1414"  # sqrt(0.02), by n - 1
    assert (spread_text([]), spread_text([-0.00001])) == ("–", "0.0000")
    signed = [signed_text(value) for value in (-1e-9, float("nan"), -2500.0)]
    assert signed == ["0.0000", "–", "−2,500.0"]
    assert p_text(0.00001) == "< 0.0001"
