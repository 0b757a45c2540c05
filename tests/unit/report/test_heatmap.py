"""The rank history as a picture."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from dynlora.report.heatmap import colour_range, rank_table, time_edges, write_heatmap
from tests.unit.events import make_event

START = {"m.0.q": 8, "m.0.k": 8, "m.1.q": 8}
END = {"m.0.q": 16, "m.0.k": 4, "m.1.q": 8}
EVENTS = [make_event(10, START, END)]


def test_the_table_holds_ranks_at_the_start_and_after_each_event() -> None:
    back = make_event(20, END, START)
    expected = [[8, 16, 8], [8, 4, 8], [8, 8, 8]]
    assert rank_table([*EVENTS, back], START).tolist() == expected
    assert rank_table([], START).tolist() == [[8], [8], [8]]


def test_columns_begin_at_events_and_the_last_can_always_be_seen() -> None:
    assert time_edges(EVENTS, 100).tolist() == [0, 10, 100]
    assert time_edges([], 100).tolist() == [0, 100]
    assert time_edges([make_event(100, START, END)], 100).tolist() == [0, 100, 102]
    assert time_edges([make_event(1, START, END)], 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "low", "high"),
    [
        ([[8, 8]], 8 / 1.5, 12),
        ([[8, 16], [8, 7]], 4, 16),
        ([[8, 9], [8, 4]], 4, 16),
        ([[8, 82], [8, 6]], 8 / 3, 24),
        ([[8, 1]], 8 / 3, 24),
    ],
)
def test_the_rank_at_the_start_is_in_the_middle_of_the_colours(
    ranks: list[list[int]], low: float, high: float
) -> None:
    found = colour_range(np.array(ranks))
    assert found == pytest.approx((low, high))
    assert found[0] * found[1] == pytest.approx(8 * 8)


def draw(path: Path, events: list[object], end: dict[str, int] | None = None) -> np.ndarray:
    write_heatmap(events, path, initial=START, budget=1000, steps=100)
    return imread(path)[..., :3]


def saturated(image: np.ndarray) -> tuple[int, int]:
    """Return how many pixels of the map's left three quarters are orange and how many violet."""
    part = image[:, : int(0.75 * image.shape[1])].astype(float)
    red, blue = part[..., 0], part[..., 2]
    return int((red - blue > 0.08).sum()), int((blue - red > 0.08).sum())


def test_growth_is_orange_loss_is_violet_and_no_change_is_neither(tmp_path: Path) -> None:
    grown, lost = saturated(draw(tmp_path / "moved.png", EVENTS))
    assert grown > 1000
    assert lost > 1000
    still = draw(tmp_path / "still.png", [make_event(10, START, START)])
    assert saturated(still) == (0, 0)
    assert saturated(draw(tmp_path / "none.png", [])) == (0, 0)


def test_events_are_marked_where_they_happened(tmp_path: Path) -> None:
    none = draw(tmp_path / "none.png", [])
    marked = draw(tmp_path / "one.png", [make_event(50, START, START)])
    height = none.shape[0]
    rows = slice(int(0.4 * height), int(0.7 * height))
    columns = np.flatnonzero((marked[rows] < 0.6).all(axis=2).any(axis=0))
    without = np.flatnonzero((none[rows] < 0.6).all(axis=2).any(axis=0))
    assert len(columns) > 0
    assert set(columns) - set(without), "a dark line appears inside the map"


@pytest.mark.parametrize("layers", [1, 7, 400])
def test_any_number_of_layers_can_be_drawn(tmp_path: Path, layers: int) -> None:
    start = {f"model.layers.{n}.q_proj": 8 for n in range(layers)}
    end = {name: 1 + n % 30 for n, name in enumerate(start)}
    path = tmp_path / "ranks.png"
    write_heatmap([make_event(1, start, end)], path, initial=start, budget=1, steps=2)
    height, width = imread(path).shape[:2]
    assert width == 1080
    assert 150 < height <= 7200


def test_layers_may_start_with_different_ranks(tmp_path: Path) -> None:
    start = {"a.0": 2, "a.1": 64}
    write_heatmap([], tmp_path / "ranks.png", initial=start, budget=1, steps=2)
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    draw(tmp_path / "ranks.png", EVENTS)
    assert dict(mpl.rcParams) == before
