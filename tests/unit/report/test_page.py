"""The report's page: whole, escaped, self-contained, for runs of every kind and size."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from dynlora.report.page import report_page
from dynlora.runs.reader import read_run
from tests.unit.report.pages import Seen, parse_page
from tests.unit.report.runs import (
    block_names,
    config_values,
    make_events,
    run_values,
    write_run,
)

NAMES = block_names(2)
SEVEN = tuple(f"part.kind{n}" for n in range(7))


def page(folder: Path, **parts: object) -> str:
    return report_page(read_run(write_run(folder / "a-run", **parts)))


def drawings(html: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def whole_names_with_ranks(seen: Seen) -> dict[str, int]:
    """Return the ranks that the diagram's titles and lists tell."""
    return {
        n: int(r)
        for n, r in re.findall(r"^(\S+): rank (\d+)(?:, \d+ at the start)?$", seen.text, re.M)
    }


@pytest.mark.parametrize("steps", [(), (50,), (100,), tuple(range(1, 100, 3))], ids=len)
@pytest.mark.parametrize("names", [NAMES, block_names(12), block_names(34, SEVEN)], ids=len)
def test_every_layers_final_rank_is_on_the_page(
    tmp_path: Path, names: list[str], steps: Sequence[int]
) -> None:
    events = make_events(names, steps)
    final = dict.fromkeys(names, 8)
    if events:
        final = {name: layer.rank_after for name, layer in events[-1].layers.items()}
    html = page(tmp_path, events=events, run=run_values(final_ranks=final))
    assert whole_names_with_ranks(parse_page(html)) == final
    cells = [svg for svg in drawings(html) if "Ranks of" in (svg[0].text or "")]
    written = [text.text for svg in cells for text in svg.iterfind(".//text[@class='n']")]
    assert [int(rank or "") for rank in written] == list(final.values())
    assert len(html.encode()) < 2_000_000


def test_240_layers_and_many_logged_lines_stay_small(tmp_path: Path) -> None:
    names = [*block_names(34, SEVEN), "lm_head"]
    metrics = [{"step": n, "loss": 1 / (1 + n)} for n in range(20_000)]
    html = page(tmp_path, events=make_events(names, [10, 20, 30, 40, 50]), metrics=metrics)
    assert len(names) == 240
    assert len(html.encode()) < 700_000


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    seen = parse_page(page(tmp_path, events=make_events(NAMES, [50])))
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {
        t for t, _ in seen.tags
    }
    for _, attributes in seen.tags:
        assert not {"src", "href", "xlink:href", "srcset"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
        assert not any("http" in (value or "") for value in attributes.values())
    html = page(tmp_path, events=make_events(NAMES, [50]))
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_follows_the_readers_colours_and_paper(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_whatever_a_file_holds_is_escaped(tmp_path: Path) -> None:
    evil = '</style></svg><script>alert("1")</script>&amp;\'<img src=x onerror=y>'
    names = [f"m.layers.0.{evil}", "m.layers.0.q", evil]
    root = write_run(
        tmp_path / "<script>run&amp;",
        events=make_events(names, [50]),
        run=run_values(
            method=evil, machine={"gpu": evil}, metrics_before={evil: 1.0},
            metrics_after={evil: 2.0}, rows={evil: 3}, seconds={evil: 1.0}, parameters={evil: 1},
        ),
        config=config_values(model={"name": evil}, data={"path": evil}, **{evil: evil}),
        metrics=[{"step": 0, f"eval_{evil}": 1.0}, {"step": 9, f"eval_{evil}": 2.0}],
    )  # fmt: skip
    html = report_page(read_run(root))
    seen = parse_page(html)
    assert "<script>run&amp;" in seen.text
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert len(seen.named("style")) == 1
    assert seen.text.count(evil) > 10
    assert len(drawings(html)) > 3


def test_a_name_that_is_no_unicode_can_still_be_drawn(tmp_path: Path) -> None:
    html = page(tmp_path, run=run_values(final_ranks={"a\ud800b": 4}))
    assert b"a?b" in html.encode("utf-8", "replace")


def test_drawings_say_in_words_what_they_show(tmp_path: Path) -> None:
    html = page(tmp_path, events=make_events(NAMES, [50]))
    labelled = [svg for svg in drawings(html) if svg.get("role") == "img"]
    assert len(labelled) == 5, "map, stack, pooler, and two curves"
    seen = parse_page(html)
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in labelled:
        assert [child.tag for child in svg[:2]] == ["title", "desc"]
        assert all(child.text for child in svg[:2])
        assert set((svg.get("aria-labelledby") or "").split()) <= set(ids)


def test_the_map_tells_each_layers_ranks_over_time(tmp_path: Path) -> None:
    events = make_events(NAMES, [10, 20])
    html = page(tmp_path, events=events)
    layer = NAMES[0]
    ranks = [event.layers[layer].rank_after for event in events]
    assert f"{layer}: rank 8, {ranks[0]} from step 10, {ranks[1]} from step 20" in html
    assert f">8 → {ranks[1]}<" in html


def test_events_are_marked_in_the_map_and_in_each_curve(tmp_path: Path) -> None:
    html = page(tmp_path, events=make_events(NAMES, [10, 20, 30]))
    marks = [svg.findall(".//g[@class='events']/line") for svg in drawings(html)]
    assert [len(lines) for lines in marks if lines] == [3, 3, 3]
    pixels = [float(line.get("x1", "")) for line in marks[-1]]
    assert pixels[1] - pixels[0] == pytest.approx(pixels[2] - pixels[1])


def test_the_numbers_before_and_after_are_told_with_their_verdict(tmp_path: Path) -> None:
    text = " ".join(parse_page(page(tmp_path)).text.split())
    assert "pearson 0.1250 0.6250 +0.5000 better" in text
    assert "loss 0.7500 0.5000 −0.2500 better" in text
    assert "end 9,876 98.8%" in text
    assert "dynamic part" not in text, "this run has no ranks that move"
    assert "peak memory 3.00 GiB" in text
    assert "some/model" in text
    assert "400 train, 100 validation rows" in text


def test_events_are_tabled_with_what_moved_most_and_what_waits(tmp_path: Path) -> None:
    events = make_events(NAMES, [10])
    text = " ".join(parse_page(page(tmp_path, events=events)).text.split())
    assert "# step agreement parameters" in text
    assert "1 10 3.00 0 0.0% 4 3 0.attention.self.query 8 → 6" in text
    assert "waiting" in text


def test_the_configuration_can_be_unfolded(tmp_path: Path) -> None:
    seen = parse_page(page(tmp_path))
    assert len(seen.named("details")) == 2
    assert "lora_alpha: 16.0" in seen.text
    assert "torch: 2.8.0" in seen.text


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_shown_as_far_as_it_went(tmp_path: Path, status: str) -> None:
    values = run_values(status=status, metrics_after=None, parameters=None, seconds=None)
    text = parse_page(page(tmp_path, events=make_events(NAMES, [10]), run=values)).text
    assert status in text
    assert "after 100 steps" in text
    assert "Ranks while training" in text


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_a_run_without_ranks_shows_the_rest(tmp_path: Path, method: str) -> None:
    text = parse_page(page(tmp_path, run=run_values(method=method))).text
    assert "Ranks while training" not in text
    assert "Loss and metrics" in text


def test_a_run_that_had_only_begun_can_be_shown(tmp_path: Path) -> None:
    values = {"status": "running", "method": "dynamic"}
    text = parse_page(page(tmp_path, run=values, metrics=[])).text
    assert "no curve to draw" in text
    assert "Before and after" not in text
    assert "Loss and metrics" not in text


def test_ranks_that_did_not_move_are_explained(tmp_path: Path) -> None:
    values = run_values(final_ranks=dict.fromkeys(NAMES, 8))
    text = parse_page(page(tmp_path, run=values)).text
    assert "Ranks did not move: no event came" in text


def test_layers_without_block_numbers_are_listed_with_their_ranks(tmp_path: Path) -> None:
    ranks = {f"part{n}.dense": 4 + n for n in range(12)}
    seen = parse_page(page(tmp_path, run=run_values(final_ranks=ranks)))
    assert len(seen.named("li")) == 12
    lines = seen.text.split("\n")
    for name, rank in ranks.items():
        assert lines[len(lines) - 1 - lines[::-1].index(name) + 1] == str(rank)


def test_a_configuration_of_another_shape_does_not_hide_the_run(tmp_path: Path) -> None:
    config = {"model": "a/b", "data": [1, 2]}
    text = parse_page(page(tmp_path, config=config)).text
    assert json.dumps("a/b").strip('"') in text
