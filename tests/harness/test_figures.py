"""Figures: complete SVG files with the right names and the same bytes each time."""

import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl

from benchmarks.harness.report.comparison import compare
from benchmarks.harness.report.curves import curves_figure
from benchmarks.harness.report.figures import Drawing, draw, stems
from benchmarks.harness.report.rank_maps import arrange, moved_patterns, rank_figure
from benchmarks.harness.report.results import StudyResults, group, read_result
from benchmarks.harness.report.style import COLOURS, MARK, MARKERS, look
from tests.harness.records import invented_study, values

SETTING = ("minilm", "mrpc")
SVG = "{http://www.w3.org/2000/svg}"


def study_of(*runs: dict) -> StudyResults:
    (study,) = group([read_result(Path(f"s/{n}.json"), run) for n, run in enumerate(runs)])
    return study


def drawings(*runs: dict) -> dict[str, Drawing]:
    study = study_of(*runs)
    found = draw(study, SETTING, compare(study, "lora"), "lora", "x")
    return {drawing.file: drawing for drawing in found}


def texts(content: bytes | None) -> list[str]:
    assert content
    return ["".join(node.itertext()) for node in ET.fromstring(content).iter(f"{SVG}text")]


def test_each_figure_is_whole_and_names_what_it_shows():
    found = drawings(*invented_study(blocks=2))
    assert list(found) == ["x-curves.svg", "x-differences.svg", "x-ranks.svg"]
    curves = texts(found["x-curves.svg"].content)
    assert {"lora", "dynamic", "random", "validation loss", "validation accuracy"} <= {*curves}
    assert {"adapter parameters at the end", "18.4k", "73.7k"} <= {*curves}
    differences = texts(found["x-differences.svg"].content)
    assert {"dynamic, 2", "random, 8", "← better", "better →"} <= {*differences}
    assert "lora, 2" not in differences
    ranks = texts(found["x-ranks.svg"].content)
    assert {"dynamic, budget 2", "random, budget 8", "attention.self.query", "0", "1"} <= {*ranks}
    assert "lora, budget 2" not in ranks


def test_figures_are_reproducible_in_any_script_and_under_other_settings():
    runs = invented_study(methods=("lora", "$x_1$ <&>", "_方法"), budgets=(8,), blocks=1)
    first = drawings(*runs)
    for drawing in first.values():
        assert MARK.encode() in drawing.content[:2000]
        assert b"<dc:date>" not in drawing.content
    for name in ("x-curves.svg", "x-differences.svg"):
        shown = " ".join(texts(first[name].content))
        assert "$x_1$ <&>" in shown
        assert "_方法" in shown
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        assert drawings(*runs) == first
        assert (mpl.rcParams["font.size"], mpl.rcParams["svg.hashsalt"]) == (20, "other")


def test_figures_without_data_are_left_out():
    assert list(drawings(values(), values(method="a"))) == ["x-curves.svg"]
    assert moved_patterns(study_of(values(final_ranks={"a": 4, "b": 4})), SETTING, "x") == []
    assert drawings(values(status="failed"), values(seed=1, status="running")) == {}


def test_runs_without_adapter_parameters_are_drawn():
    nothing = dict.fromkeys(("start", "peak", "end"), 0)
    runs = [values(), values(method="full", parameters=nothing)]
    shown = texts(curves_figure(study_of(*runs), SETTING, "lora"))
    assert {"1", "73.7k", "full"} <= {*shown}


def test_ranks_are_averaged_over_seeds_and_written_in_their_fields():
    runs = [
        values(method="a", seed=seed, final_ranks={"m.0.q": low, "m.1.q": low + 3, "head": 0})
        for seed, low in enumerate((1, 2))
    ]
    (pattern,) = moved_patterns(study_of(*runs), SETTING, "lora")
    assert pattern.ranks == {"m.0.q": 1.5, "m.1.q": 4.5, "head": 0.0}
    assert {"1.5", "4.5", "0.0", "head", "q"} <= {*texts(rank_figure([pattern]))}


def test_every_field_of_a_rank_map_has_a_colour_even_of_rank_0():
    moved = values(method="a", final_ranks={"m.0.q": 0, "m.1.q": 9})
    lost = values(method="a", budget=16, final_ranks={"m.0.q": 0, "m.1.q": 0})
    without = values(method="a", budget=32)
    patterns = moved_patterns(study_of(moved, lost, without), SETTING, "lora")
    drawn = ET.fromstring(rank_figure(patterns))
    for number in (1, 2):
        fields = drawn.find(f".//{SVG}g[@id='QuadMesh_{number}']")
        assert fields is not None
        assert len(list(fields.iter(f"{SVG}path"))) == 2


def test_a_rank_map_sorts_blocks_and_names_several_stacks():
    layout = arrange(["m.10.v", "m.10.a", "m.2.v", "m.2.a", "head"])
    assert list(layout.rows) == [("m", 2), ("m", 10), ("", -1)]
    assert list(layout.columns) == ["v", "a", "head"]
    assert layout.labels() == ["2", "10", "–"]
    layout = arrange(["model.encoder.0.q", "model.decoder.0.q"])
    assert layout.labels() == ["decoder 0", "encoder 0"]


def test_63_methods_look_different_and_the_reference_like_none_of_them():
    methods = [f"m{n}" for n in range(len(COLOURS) * len(MARKERS))]
    looks = look(["lora", *methods], "lora")
    assert len({(own["color"], own["marker"]) for own in looks.values()}) == 64
    assert all(looks[method]["color"] != looks["lora"]["color"] for method in methods)


def test_file_names_are_plain_short_and_different():
    settings = (("/models/MiniLM/", "x/y"), ("other/minilm", "x/y"), ("..", "$"))
    study = study_of(*(values(study="A b", model=model, task=task) for model, task in settings))
    found = stems([study])
    names = [found["A b", setting] for setting in settings]
    assert names == ["a-b-minilm-x-y", "a-b-minilm-x-y-2", "a-b--"]
