"""`dynlora report` and `dynlora compare`: pages and tables of runs, and the refused inputs."""

import csv
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from dynlora.cli.main import main
from dynlora.report.tables import tables_of
from dynlora.runs.reader import read_run
from tests.cli.finished import facts, read_lines
from tests.jobs import missing
from tests.unit.report.pages import parse_page
from tests.unit.report.runs import (
    block_names,
    config_values,
    make_events,
    run_values,
    write_run,
)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", events=make_events(block_names(2), [10, 20]))


@pytest.mark.parametrize("method", ["dynamic", "adalora", "full"])
def test_a_trained_run_gets_a_report(finished_by, tmp_path, said, method):
    path, values = tmp_path / "page.html", facts(finished_by(method))
    assert said("report", finished_by(method), "--output", path) == {
        "report": str(path), "bytes": path.stat().st_size, "status": "finished", "notes": [],
    }  # fmt: skip
    html = path.read_text()
    text = parse_page(html).text
    for name, value in values["metrics_after"].items():
        assert missing(text, name, f"{value:.4f}") == []
    assert ("Ranks while training" in text) == (method == "dynamic")
    assert ("The model, layer by layer" in text) == (method != "full")
    if method == "dynamic":
        ranks = values["final_ranks"].items()
        assert missing(html, *(f'title="{layer}: rank {rank}' for layer, rank in ranks)) == []


def test_a_report_can_go_elsewhere_and_replace_an_older_one(run, tmp_path, capsys):
    path = tmp_path / "new" / "page.html"
    for _ in range(2):
        assert main(["report", str(run), "--output", str(path)]) == 0
        assert "dynamic,finished" in "".join(capsys.readouterr().out.split())
    assert not (run / "report.html").exists()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    parse_page(path.read_text())
    assert main(["report", str(run), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_unfinished_run_gets_its_report_with_a_note(tmp_path, capsys):
    values = run_values(status="interrupted", metrics_after=None)
    root = write_run(tmp_path / "run", run=values)
    assert main(["report", str(root)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "note: This run was stopped by its user after 100 steps.\n"
    assert "interrupted" in printed.out
    assert "interrupted" in parse_page((root / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("file", "told"),
    [("run.json", "a folder without one"), ("config.yaml", "readable config.yaml")],
)
def test_a_run_without_one_of_its_files_is_refused(run, refused, file, told):
    (run / file).unlink()
    assert told in refused("report", run)


def test_only_a_run_is_read_and_only_a_report_is_replaced(run, refused):
    for arguments, told in {
        (run / "nowhere",): "nowhere, which is no folder",
        (run / "run.json",): "run.json' is a file",
        (run, "--output", run / "run.json"): "run.json, which is neither",
        (run, "--output", run): "which is a folder",
        (run, "--output", run / "run.json" / "page.html"): "a path must be accessible",
    }.items():
        assert told in refused("report", *arguments)


def test_a_dynamic_run_and_plain_lora_are_compared_layer_by_layer(finished_by, said):
    folders = [finished_by(method) for method in ("dynamic", "lora")]
    found, runs = said("compare", *folders), [facts(folder) for folder in folders]
    assert [run["metrics_after"] for run in found["runs"]] == [run["metrics_after"] for run in runs]
    assert {row["layer"]: row["ranks"] for row in found["ranks"]} == {
        layer: [rank, 2] for layer, rank in runs[0]["final_ranks"].items()
    }
    assert found["configuration"] == {"method": ["dynamic", "lora"]}
    assert found["warnings"] == []


def test_runs_may_be_three_or_twice_the_same_and_other_seeds_are_a_warning(
    run, tmp_path, said, capsys
):
    events = make_events(block_names(2), [10])
    two = write_run(tmp_path / "two", events=events, run=run_values(seed=1))
    assert main(["compare", str(run), str(two)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    told = "ranks that differ most | not comparable, other seeds: 0 against 1"
    assert missing(printed.out, told) == []
    assert max(map(len, printed.out.splitlines())) <= 100
    found = said("compare", run, two, run)
    assert [row["run"] for row in found["runs"]] == [str(run), str(two), str(run)]


@pytest.mark.parametrize(
    ("status", "method", "saved", "advice"),
    [
        ("running", "lora", True, "--training.resume latest"),
        ("interrupted", "lora", False, "--overwrite true"),
        ("failed", "adalora", True, "--overwrite true"),
    ],
)
def test_an_unfinished_run_is_not_compared_and_the_command_that_finishes_it_is_told(
    run, tmp_path, refused, status, method, saved, advice
):
    values = run_values(status=status, method=method, steps=None)
    root = write_run(tmp_path / "half", run=values)
    checkpoint = root / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    if saved:
        (checkpoint / "job.json").write_text("{}")
    command = f"`dynlora train {root / 'config.yaml'} --output {root} {advice}`"
    told = f"must be finished, got {root} | {command}"
    assert missing(refused("compare", run, root), told) == []


def test_fewer_than_two_runs_and_other_folders_are_not_compared(run, tmp_path, refused):
    for arguments, told in {
        (run,): f"two runs or more, but got {run}",
        (run, tmp_path): "a folder without one",
        (tmp_path, run): "a folder without one",
    }.items():
        assert told in refused("compare", *arguments)


def rows_of(path):
    """Return the rows of a CSV file, by column."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def compared(folder, *runs):
    """Return the page that compares runs, and its tables by name, as an export has them."""
    page, tables = folder / "page.html", folder / "tables"
    command = ["report", *map(str, runs), "--output", str(page), "--export", str(tables)]
    assert main([*command, "--quiet"]) == 0
    return parse_page(page.read_text()), {path.stem: rows_of(path) for path in tables.glob("*.csv")}


@pytest.mark.parametrize("methods", [["dynamic"], ["dynamic", "lora", "full"]], ids=len)
def test_an_export_contains_the_numbers_of_the_runs_files_and_every_drawing(
    finished_by, tmp_path, said, methods
):
    runs = [finished_by(method) for method in methods]
    folder, page = tmp_path / "out", tmp_path / "page.html"
    for _ in range(2):
        result = said("report", *runs, "--output", page, "--export", folder)
        assert result["export"] == str(folder)
    values = [facts(run) for run in runs]
    for row, run, known in zip(rows_of(folder / "runs.csv"), runs, values, strict=True):
        assert (row["method"], row["folder"]) == (known["method"], str(run))
        for when in ("before", "after"):
            for name, value in known[f"metrics_{when}"].items():
                assert float(row[f"{name} {when}"]) == value
        assert int(row["parameters"]) == known["parameters"]["end"]
        assert int(row["peak_memory_bytes"]) == known["peak_memory_bytes"]
    logged = [
        {"number": str(number), **{key: str(x) for key, x in line.items() if x is not None}}
        for number, run in enumerate(runs, start=1)
        for line in read_lines(run / "metrics.jsonl")
    ]
    found = [{k: v for k, v in row.items() if v} for row in rows_of(folder / "log.csv")]
    assert found == logged
    ranks = rows_of(folder / "ranks.csv")
    for number, known in enumerate(values, start=1):
        if known["method"] != "full":
            ends = {row["layer"]: [*row.values()][number] for row in ranks}
            expected = known.get("final_ranks") or dict.fromkeys(ends, 2)
            assert ends == {layer: str(rank) for layer, rank in expected.items()}
    last = {row["layer"]: row["rank after"] for row in rows_of(folder / "events.csv")}
    assert last == {layer: str(rank) for layer, rank in values[0]["final_ranks"].items()}
    drawn = {path.stem for path in folder.glob("*.svg")}
    assert drawn == {path.stem for path in folder.glob("*.png")}
    assert len(drawn) == len(re.findall("<svg", page.read_text()))
    for name in drawn:
        text = (folder / f"{name}.svg").read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            for side, pixels in zip(("width", "height"), image.size, strict=True):
                assert pixels == pytest.approx(1.6 * float(root.get(side)), abs=2)
            assert len(image.getcolors(10**6)) > 2


def test_an_export_replaces_only_an_earlier_one(run, tmp_path, refused, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert main(["report", str(run), "--export", str(folder), "--quiet"]) == 0, "an empty folder"
    page = folder / "page.html"
    link = tmp_path / "link"
    link.symlink_to(folder)
    for place in (folder, folder, link):
        command = ["report", str(run), "--export", str(place), "--output", str(page)]
        assert main([*command, "--quiet"]) == 0, "the page may be in its folder"
    assert link.is_symlink()
    told = refused("report", run, "--export", folder / "new", "--output", folder / "new")
    assert "the folder of `--export`" in told
    (folder / "mine.csv").write_text("kept")
    assert "is a file" in refused("report", run, "--export", run / "run.json")
    for taken in (folder, run):
        assert "new folder or an earlier export" in refused("report", run, "--export", taken)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for nameless in (".", ".."):
        told = f"`--export` must be the name of a folder, but got {nameless}."
        assert told in refused("report", run, "--export", nameless)
    assert "Missing argument 'RUN...'" in refused("report")


def seeded(folder, method, seed, **metrics):
    config = config_values(method=method, training={"learning_rate": 1e-3, "seed": seed})
    values = run_values(method=method, seed=seed, metrics_after=metrics, machine=None)
    return write_run(folder / f"{method}-{seed}", run=values, config=config)


def test_differences_are_paired_by_seed_with_an_interval_from_three_pairs(tmp_path):
    before = {0: 0.50, 1: 0.60, 2: 0.55, 3: 0.9}
    after = {0: 0.53, 1: 0.65, 2: 0.59, 7: 0.1}
    runs = [seeded(tmp_path, "lora", seed, accuracy=x, loss=1.0) for seed, x in before.items()]
    runs += [seeded(tmp_path, "dynamic", seed, accuracy=x, loss=0.5) for seed, x in after.items()]
    runs += [seeded(tmp_path, "adalora", seed, accuracy=0.5) for seed in (0, 1)]
    other = {"learning_rate": 1e-2, "seed": 0}
    runs += [write_run(tmp_path / "other", run=run_values(), config=config_values(training=other))]
    seen, tables = compared(tmp_path, *runs)
    rows = {(row["metric"], row["setting"]): row for row in tables["differences"]}
    assert set(rows) == {("accuracy", "dynamic"), ("loss", "dynamic"), ("accuracy", "adalora")}
    row = rows["accuracy", "dynamic"]
    assert (row["base"], row["pairs"], row["runs"]) == ("lora", "3", "5 − 1, 6 − 2, 7 − 3")
    # Differences 0.03, 0.05, 0.04: mean 0.04, deviation 0.01; Student's 97.5 % of 2 is 4.30265.
    reach = 4.30265 * 0.01 / 3**0.5
    found = [float(row[key]) for key in ("mean", "95 % from", "to")]
    assert found == pytest.approx([0.04, 0.04 - reach, 0.04 + reach], abs=1e-6)
    row = rows["accuracy", "adalora"]
    assert (row["pairs"], row["95 % from"], row["to"]) == ("2", "", "")
    assert float(row["mean"]) == pytest.approx((0.0 - 0.1) / 2)
    assert missing(" ".join(seen.text.split()), "0.0400 0.0152 0.0648 3 5 − 1, 6 − 2") == []


def test_settings_without_a_seed_of_the_first_one_are_paired_with_another(tmp_path):
    runs = [("dynamic", 1, 0.9), ("lora", 2, 0.8), ("adalora", 2, 0.7)]
    roots = [seeded(tmp_path, method, seed, accuracy=value) for method, seed, value in runs]
    tables = tables_of(dict(enumerate(map(read_run, roots), start=1)))
    (row,) = tables["differences"].rows
    found = dict(zip(tables["differences"].head, row, strict=True))
    assert (found["setting"], found["base"], found["runs"]) == ("adalora", "lora", "3 − 2")
    assert found["mean"] == pytest.approx(-0.1)


def test_running_runs_without_an_evaluation_before_are_compared_by_all_they_log(tmp_path):
    running = {"status": "running", "method": "lora"}
    lines = [{"step": step, "eval_loss": 0.9, "eval_accuracy": 0.1 * step} for step in (1, 2)]
    roots = [write_run(tmp_path / name, run=running, metrics=lines) for name in "ab"]
    page = tmp_path / "page.html"
    assert main(["report", *map(str, roots), "--output", str(page), "--quiet"]) == 0
    drawn = " ".join(parse_page(page.read_text()).text.split())
    assert missing(drawn, "validation loss | accuracy") == []


def test_the_pareto_front_has_the_runs_that_no_other_beats(tmp_path):
    runs = [
        write_run(tmp_path / name, run=run_values(metrics_after=after, parameters={"end": size}))
        for name, size, after in [
            ("small", 100, {"matthews": 0.5}), ("worse", 200, {"matthews": 0.4}),
            ("large", 300, {"matthews": 0.6}), ("same", 300, {"matthews": 0.6}),
            ("chance", 50, {"matthews": 0.0}), ("unknown", 40, {"matthews": None}),
        ]
    ]  # fmt: skip
    seen, tables = compared(tmp_path, *runs)
    found = {row["run"]: row["Pareto front"] for row in tables["parameters"]}
    assert found == {"small": "yes", "worse": "no", "large": "yes", "same": "yes"}
    assert missing(seen.text, "Run 5: after training, predictions are no better than chance") == []


def test_many_runs_with_hostile_and_long_names_are_compared_as_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y>var(--ink)".replace("/", "")
    names = [f"m.layers.0.{evil}", "m.layers.0.q"]
    runs = [
        write_run(
            tmp_path / f"{evil[: 60 * (n % 2)]}{'long' * 20 * (n % 3)}{n}",
            events=make_events(names, [10, 20]),
            run=run_values(
                method=evil,
                seed=n,
                metrics_after={evil: [0.5, 1e308, -1e308][n % 3], "../up": n},
                parameters={"end": [-1, 0, 1e308, 5][n % 4]},
            ),
            metrics=[{"step": 1, "loss": 0.5, f"eval_{evil}": 0.1 * n, evil: '\n,"'}],
        )
        for n in range(30)
    ]
    seen, tables = compared(tmp_path, *runs)
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert missing(seen.text, "the charts show the first 6 of 30 runs", "30 runs compared") == []
    assert [row["run"] for row in tables["runs"]] == [run.name for run in runs]
    assert [row["number"] for row in tables["log"]] == [str(n + 1) for n in range(30)]
    assert len(list((tmp_path / "tables").glob("map-*.png"))) == 12
    for path in (tmp_path / "tables").glob("*.svg"):
        ElementTree.fromstring(path.read_text())
