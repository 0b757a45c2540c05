"""`dynlora report` and `dynlora compare`: pages and tables of runs, and the refused inputs."""

import pytest

from dynlora.cli.main import main
from tests.cli.finished import facts
from tests.jobs import missing
from tests.unit.report.pages import parse_page
from tests.unit.report.runs import block_names, make_events, run_values, write_run


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
        (run / "run.json",): "run.json, which is no folder",
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
        (run,): f"at least two runs, got 1, {run}: give another",
        (run, tmp_path): "a folder without one",
        (tmp_path, run): "a folder without one",
    }.items():
        assert told in refused("compare", *arguments)
