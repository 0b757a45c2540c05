"""Drawings as pictures and as parts of a page, and the order and short names of layers."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from dynlora.layer_names import short_names
from dynlora.report.curves import MOST_POINTS, axes, charts, draw_chart
from dynlora.report.layers import Stack, arrange
from dynlora.report.rank_map import rank_map, scale_of, write_rank_map
from dynlora.report.svg import DARK, LIGHT, REACH, rank_scale, to_svg
from tests.unit.events import make_event
from tests.unit.report.runs import KINDS, METRICS, block_names

START = {"m.0.q": 8, "m.0.k": 8, "m.1.q": 8}
END = {"m.0.q": 16, "m.0.k": 4, "m.1.q": 8}


def draw(path: Path, events: list[object], start: dict[str, int] = START) -> np.ndarray:
    write_rank_map(events, path, initial=start, budget=1000, steps=100)
    return imread(path)[..., :3]


def saturated(image: np.ndarray) -> tuple[int, int]:
    """Return the numbers of orange and of violet pixels."""
    red, blue = image[..., 0], image[..., 2]
    return int((red - blue > 0.2).sum()), int((blue - red > 0.15).sum())


def test_growth_is_orange_loss_is_violet_and_no_change_is_neither(tmp_path: Path) -> None:
    grown, lost = saturated(draw(tmp_path / "moved.png", [make_event(10, START, END)]))
    assert grown > 10_000
    assert lost > 10_000
    last = draw(tmp_path / "last.png", [make_event(100, START, END)])
    assert min(saturated(last)) > 300, "a change in the last step is visible"
    assert saturated(draw(tmp_path / "still.png", [make_event(10, START, START)])) == (0, 0)
    assert saturated(draw(tmp_path / "none.png", [])) == (0, 0)


def test_ranks_of_neighbouring_steps_are_drawn(tmp_path: Path) -> None:
    ranks = [START, END, START, END]
    events = [make_event(4000 + n, *pair) for n, pair in enumerate(pairwise(ranks))]
    write_rank_map(events, tmp_path / "ranks.png", initial=START, budget=1000, steps=100_000)
    assert min(saturated(imread(tmp_path / "ranks.png")[..., :3])) > 10_000, "the last ranks"


def test_the_rows_of_many_layers_are_thin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynlora.report.rank_map.TALLEST", 300.0)
    image = draw(tmp_path / "ranks.png", [], {f"model.layers.0.part{n}": 8 for n in range(60)})
    assert 150 < image.shape[0] < 700


def test_a_doubled_rank_is_as_strong_as_a_halved_one_within_limits() -> None:
    scale = scale_of([make_event(10, START, END)], START, END)
    assert scale.reach == 2
    assert scale.strength(16, 8) == pytest.approx(1) == -scale.strength(4, 8)
    assert 0 < scale.strength(9, 8) < scale.strength(12, 8) < 1
    assert (scale.strength(8, 8), scale.strength(0, 0), scale.strength(0, 8)) == (0, 0, -1)
    for moves, reach in (([], REACH[0]), ([(9, 8)], REACH[0]), ([(80, 8), (0, 8)], REACH[1])):
        assert rank_scale(moves).reach == reach
    assert rank_scale([(80, 8)]).strength(80, 8) == 1


def contrast(*colours: np.ndarray) -> float:
    linear = [np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in colours]
    low, high = sorted(float(c @ (0.2126, 0.7152, 0.0722)) for c in linear)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme: dict[str, str]) -> None:
    colours = {name: np.array(to_rgb(code)) for name, code in theme.items()}
    for side in ("up", "down"):
        for share in (0, 0.5, 1):
            mixed = share * colours[side] + (1 - share) * colours["ground"]
            assert contrast(colours["ink"], mixed) >= 4.5, (side, share)
    for name in ("ink", "soft", "good", "bad", "training", "validation"):
        assert contrast(colours[name], colours["paper"]) >= 4.5, name


def test_a_drawing_is_the_same_each_time_and_has_only_the_colours_of_a_page() -> None:
    events = [make_event(10, START, END)]
    texts = []
    for _ in range(2):
        drawing = rank_map(events, START, steps=100, scale=rank_scale([(16, 8)]))
        chart = draw_chart("loss", charts(METRICS, ["loss"])["loss"], at=[10], steps=100)
        texts.append([to_svg(drawing, "map"), to_svg(chart, "chart")])
    assert texts[0] == texts[1]
    for text in texts[0]:
        assert not re.search("#[0-9a-f]{6}|http|nan", text)
        ET.fromstring(text)


def test_names_are_written_as_they_are_even_where_they_look_like_formulas() -> None:
    shown = {
        "a.$x$.b": "$x$.b",
        "a.\n<b>": "�<b>",
        "a.\x00\ud800": "��",
        "a.图": "图",
        'a.style="fill: #a99be0"': 'style="fill: #a99be0"',
    }
    drawing = rank_map([], dict.fromkeys(shown, 8), steps=1, scale=rank_scale([]))
    svg = re.sub("<title>.*?</title>", "", to_svg(drawing, "map"), flags=re.DOTALL)
    texts = [text.text for text in ET.fromstring(svg).iter("text")]
    assert [text for text in texts if text in shown.values()] == list(shown.values())


def test_there_is_a_chart_for_the_loss_and_for_each_metric_with_finite_values() -> None:
    found = charts(METRICS, ["pearson", "loss", "never_logged"])
    assert list(found.items()) == [
        ("loss", {"training": [(10, 0.7), (30, 0.6)], "validation": [(0, 0.75), (100, 0.5)]}),
        ("pearson", {"validation": [(0, 0.125), (100, 0.625)]}),
    ]
    odd = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "x"}, {"step": 3, "loss": 1e301}]
    assert charts(odd, ["loss"]) == {}


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], [1e-9, 2e-9], [-1e300, 1e300], [0.0, 5e-324]]
)
def test_points_are_inside_the_chart_and_higher_for_larger_values(values: list[float]) -> None:
    metrics = [{"step": n, "eval_m": value} for n, value in enumerate(values)]
    lines = charts(metrics, ["m"])["m"]
    svg = ET.fromstring(to_svg(draw_chart("m", lines, at=[], steps=len(values)), "chart"))
    points = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in svg.iter("circle")]
    assert len(points) == len(values)
    assert all(44 <= y <= 184 for _, y in points)
    if len(set(values)) == 2 and abs(values[1]) > 1e-300:
        assert points[0][0] < points[1][0]
        assert points[0][1] > points[1][1]


@pytest.mark.parametrize("low", [0.7, 1000.1, 52_000.1, -3e-7, 2e8])
def test_numbers_of_an_axis_differ_however_close_its_values_are(low: float) -> None:
    for apart in (1e-5 * abs(low), 1e-3 * abs(low), 1e-9 * abs(low)):
        marks = [shape for shape in axes("loss", [low, low + apart])[0] if "<text" in shape][2:]
        texts = [re.sub("<.*?>", "", mark) for mark in marks]
        assert len(set(texts)) == len(texts) > 1
        assert all(len(text) <= 10 for text in texts)


def test_long_series_become_means_of_neighbouring_points() -> None:
    found = charts([{"step": n, "loss": float(n % 7)} for n in range(1234)], [])
    points = found["loss"]["training"]
    assert len(points) <= MOST_POINTS
    assert (points[0], points[-1]) == ((2, 1.0), (1233, 1.0)), "the last one is no mean"


def test_blocks_form_a_grid_and_layers_outside_blocks_are_listed() -> None:
    first, stack, last = arrange(["embed", *block_names(3), "classifier", "heads.0"])
    assert first == ("embed",)
    assert isinstance(stack, Stack)
    assert (stack.prefix, list(stack.blocks), stack.kinds) == (
        "bert.encoder.layer", ["0", "1", "2"], KINDS,
    )  # fmt: skip
    assert last == ("bert.pooler.dense", "classifier", "heads.0")
    names = [f"{side}.block.{n}.layer.1.q" for side in ("encoder", "decoder") for n in range(2)]
    parts = arrange([*names, "0.q"])
    assert [(part.prefix, part.kinds) for part in parts if isinstance(part, Stack)] == [
        ("encoder.block", ("layer.1.q",)), ("decoder.block", ("layer.1.q",)), ("", ("q",)),
    ]  # fmt: skip


def test_stacks_of_many_or_unlike_kinds_are_listed() -> None:
    experts = tuple(f"layers.{n}.experts.{e}.up" for n in range(2) for e in range(64))
    assert arrange(experts) == [experts]
    unlike = tuple(f"layers.{n}.kind{n}" for n in range(4))
    assert arrange(unlike) == [unlike]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["b.layer.1.q", "b.layer.0.q", "b.pooler"], ["1.q", "0.q", "pooler"]),
        (["t5.a.block.0.q", "t5.b.block.0.q"], ["a.block.0.q", "b.block.0.q"]),
        (["model.query"], ["query"]),
        (["a.0", "a.1"], ["0", "1"]),
        ([], []),
    ],
)  # fmt: skip
def test_short_names_are_unique_and_in_order(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))
