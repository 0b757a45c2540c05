"""The report's page: whole, escaped, self-contained, for runs of every kind and size."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from dynlora.report.page import report_page, write_page
from dynlora.runs.reader import read_run
from tests.unit.report.pages import Seen, parse_page
from tests.unit.report.runs import block_names, config_values, make_events, run_values, write_run

NAMES = block_names(2)
SEVEN = tuple(f"part.kind{n}" for n in range(7))


def page(folder: Path, **parts: object) -> str:
    return report_page(read_run(write_run(folder / "a-run", **parts)))


def words(html: str) -> str:
    return " ".join(parse_page(html).text.split())


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the page of a run whose ranks moved at steps 10, 20, 30 and 40."""
    return page(tmp_path_factory.mktemp("moved"), events=make_events(NAMES, [10, 20, 30, 40]))


def drawings(html: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def cells(seen: Seen) -> dict[str, int]:
    titles = [a["title"] or "" for a in seen.named("span") if "title" in a]
    found = [re.fullmatch(r"(\S+): rank (\d+)(?:, \d+ at the start)?", title) for title in titles]
    return {match[1]: int(match[2]) for match in found if match}


MANY = [*block_names(33, SEVEN), *(f"part{n}.dense" for n in range(7)), "lm_head"]


@pytest.mark.parametrize(("names", "steps"), [(NAMES, ()), (MANY, (10, 50))], ids=len)
def test_every_layers_final_rank_is_on_a_small_page(
    tmp_path: Path, names: list[str], steps: tuple[int, ...]
) -> None:
    events = make_events(names, steps)
    final = dict.fromkeys(names, 8)
    if events:
        final = {name: layer.rank_after for name, layer in events[-1].layers.items()}
    metrics = [{"step": n, "loss": 1 / (1 + n)} for n in range(100 * len(names))]
    html = page(tmp_path, events=events, run=run_values(final_ranks=final), metrics=metrics)
    assert cells(parse_page(html)) == final
    shown = re.findall(r'class="cell.*?>(\d+)</span>', html)
    assert [*map(int, shown)] == [*final.values()]
    assert len(html.encode()) < 500_000


def test_the_page_loads_nothing_and_runs_nothing(moved: str) -> None:
    seen = parse_page(moved)
    refused = {"script", "link", "img", "iframe", "object", "image"}
    assert not refused & {tag for tag, _ in seen.tags}
    for _, attributes in seen.tags:
        assert not {"src", "xlink:href", "srcset"} & attributes.keys()
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    for external in ("http", "@import"):
        assert external not in moved
    assert not re.search(r"url\((?!#)", moved)
    for kept in ("@media screen and (prefers-color-scheme: dark)", "@media print"):
        assert kept in moved


def test_every_text_from_a_file_is_escaped(tmp_path: Path) -> None:
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
    assert len(drawings(html)) == 2


def test_a_name_that_is_no_unicode_can_still_be_written(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page(tmp_path, run=run_values(task="a\ud800b")))
    assert b"a?b" in (tmp_path / "page.html").read_bytes()


def test_drawings_say_in_words_what_they_show(moved: str) -> None:
    svgs = drawings(moved)
    assert len(svgs) == 3, "rank map, loss and pearson"
    ids = [attributes["id"] for _, attributes in parse_page(moved).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for svg in svgs:
        assert svg.get("role") == "img"
        assert [child.tag for child in svg[:2]] == ["title", "desc"]
        assert all(child.text for child in svg[:2])
        assert {child.get("id") for child in svg[:2]} == set(svg.get("aria-labelledby", "").split())


def test_the_map_tells_each_layers_ranks_over_time_and_events_are_marked(moved: str) -> None:
    layer = NAMES[0]
    told = f"{layer}: rank 8, 6 from step 10, 7 from step 20, 8 from step 30, 6 from step 40"
    assert f"<title>{told}</title>" in moved
    assert ">8 → 6<" in moved
    for svg in drawings(moved):
        dashed = [line for line in svg.iter("polyline") if line.get("stroke-dasharray")]
        pixels = [float(line.get("points", "").partition(",")[0]) for line in dashed]
        assert len(pixels) == 4
        assert pixels[1] - pixels[0] == pytest.approx(pixels[2] - pixels[1], abs=0.02)


def test_the_page_contains_the_facts_metrics_and_settings(moved: str) -> None:
    text = words(moved)
    for part in (
        "400 train, 100 validation rows", "some/model",
        "pearson 0.1250 0.6250 +0.5000 better", "loss 0.7500 0.5000 −0.2500 better",
        "end 9,876 98.8%", "dynamic part 0.50 s 2.5%", "peak memory 3.00 GiB",
        "Validation metrics by step step loss pearson 0 0.7500 0.1250 100 0.5000 0.6250",
        "1 10 3.00 0 0.0% 4 3 0.attention.self.query 8 → 6 1.attention.self.query 8 → 6",
        "lora_alpha: 16.0", "torch: 2.8.0",
    ):  # fmt: skip
        assert part in text
    assert "0.attention.self.query 8 6 score" in text
    assert len(parse_page(moved).named("details")) == 4


def test_an_unfinished_run_is_shown_as_far_as_it_went(tmp_path: Path) -> None:
    values = run_values(status="failed", metrics_after=None, parameters=None, seconds=None)
    text = words(page(tmp_path, events=make_events(NAMES, [10]), run=values))
    for part in ("failed", "after 100 steps", "Ranks while training"):
        assert part in text
    text = words(page(tmp_path, run={"status": "running", "method": "dynamic"}, metrics=[]))
    assert "no curve to draw" in text
    assert "Before and after" not in text
    assert "Loss and metrics" not in text


def test_ranks_that_did_not_move_are_explained_and_other_settings_do_not_hide_the_run(
    tmp_path: Path,
) -> None:
    values = run_values(final_ranks=dict.fromkeys(NAMES, 8))
    assert "Ranks did not move: no event came" in words(page(tmp_path / "still", run=values))
    text = words(page(tmp_path, config={"model": "a/b", "data": [1, 2]}))
    assert "model: a/b" in text
    assert "Ranks while training" not in text, "this run has no ranks"
    assert "dynamic part" not in text
