"""`dynlora report`: a page about a run, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dynlora.cli.main import main
from tests.processes import run_in_group
from tests.unit.report.pages import parse_page
from tests.unit.report.runs import block_names, make_events, run_values, write_run

Train = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", events=make_events(block_names(2), [10, 20]))


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on the standard error; nothing else was said."""
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_a_run_of_every_method_gets_its_report(
    train: Train, output: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--method", method) == 0
    capsys.readouterr()
    assert main(["report", str(output), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    path = output / "report.html"
    assert said == {
        "report": str(path), "bytes": path.stat().st_size, "status": "finished", "notes": [],
    }  # fmt: skip
    text = parse_page(path.read_text()).text
    after = json.loads((output / "run.json").read_text())["metrics_after"]
    for name, value in after.items():
        assert name in text
        assert f"{value:.4f}" in text
    assert ("Ranks while training" in text) == (method == "dynamic")
    assert ("The model, layer by layer" in text) == (method != "full")
    if method == "dynamic":
        for layer, rank in json.loads((output / "run.json").read_text())["final_ranks"].items():
            assert f"{layer}: rank {rank}" in text


def test_a_report_can_go_elsewhere_and_replace_an_older_one(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for _ in range(2):
        assert main(["report", str(run), "--output", str(path)]) == 0
    assert not (run / "report.html").exists()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    parse_page(path.read_text())


def test_a_report_does_not_outlive_its_run(train: Train, output: Path) -> None:
    assert train() == 0
    assert main(["report", str(output), "--quiet"]) == 0
    assert (output / "report.html").exists()
    assert train("--overwrite", "true") == 0
    assert not (output / "report.html").exists()


def test_the_table_names_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    out = "".join(capsys.readouterr().out.split())
    assert "dynamic,finished" in out
    assert main(["report", str(run), "--quiet"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_an_unfinished_run_gets_its_report_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(status="interrupted", metrics_after=None)
    root = write_run(tmp_path / "run", run=values)
    assert main(["report", str(root)]) == 0
    said = capsys.readouterr()
    assert said.err == "note: This run was stopped by its user after 100 steps.\n"
    assert "interrupted" in said.out
    assert "interrupted" in parse_page((root / "report.html").read_text()).text


def broken_run(root: Path, what: str) -> None:
    if what == "cut":
        (root / "run.json").write_text('{"status": "fin')
    elif what == "event":
        text = (root / "ranks.jsonl").read_text().splitlines()
        (root / "ranks.jsonl").write_text(f"{text[0]}\n{text[1][:50]}\n")
    else:
        (root / what).unlink()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("run.json", "a folder without one"),
        ("config.yaml", "readable config.yaml"),
        ("cut", "15 characters"),
        ("event", "in line 2"),
    ],
)
def test_a_broken_run_is_refused_and_nothing_is_written(
    run: Path, what: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_run(run, what)
    before = sorted(run.iterdir())
    assert main(["report", str(run)]) == 2
    assert told in refused(capsys)
    assert sorted(run.iterdir()) == before


def test_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere, which is no folder" in refused(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_file_that_is_no_report_is_never_replaced(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / name).read_bytes()
    assert main(["report", str(run), "--output", str(run / name)]) == 2
    assert f"{name}, which is neither" in refused(capsys)
    assert (run / name).read_bytes() == before


def test_a_folder_or_a_file_in_the_way_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), "--output", str(run)]) == 2
    assert "which is a folder" in refused(capsys)
    assert main(["report", str(run), "--output", str(run / "run.json" / "page.html")]) == 2
    assert "must be a file that can be written" in refused(capsys)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--nothing"]])
def test_arguments_that_do_not_fit_are_refused_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) == 2
    assert "Usage: dynlora report" in refused(capsys)


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_help_comes_without_torch(verb: str) -> None:
    script = (
        f"import sys; from dynlora.cli.main import main; main(['{verb}', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = run_in_group([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.startswith(f"Usage: dynlora {verb}".encode())
