"""`dynlora report`: a page about a run, and the refused inputs."""

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
    """Return the one line on the standard error; the standard output is empty."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("method", ["dynamic", "adalora", "full"])
def test_a_trained_run_gets_a_report_that_the_next_run_removes(
    train: Train, output: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--method", method) == 0
    capsys.readouterr()
    assert main(["report", str(output), "--json"]) == 0
    path = output / "report.html"
    assert json.loads(capsys.readouterr().out) == {
        "report": str(path), "bytes": path.stat().st_size, "status": "finished", "notes": [],
    }  # fmt: skip
    html = path.read_text()
    text = parse_page(html).text
    run = json.loads((output / "run.json").read_text())
    for name, value in run["metrics_after"].items():
        assert name in text
        assert f"{value:.4f}" in text
    assert ("Ranks while training" in text) == (method == "dynamic")
    assert ("The model, layer by layer" in text) == (method != "full")
    if method == "dynamic":
        for layer, rank in run["final_ranks"].items():
            assert f'title="{layer}: rank {rank}' in html
        assert train("--overwrite", "true") == 0
        assert not path.exists()


def test_a_report_can_go_elsewhere_and_replace_an_older_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "page.html"
    for _ in range(2):
        assert main(["report", str(run), "--output", str(path)]) == 0
        assert "dynamic,finished" in "".join(capsys.readouterr().out.split())
    assert not (run / "report.html").exists()
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    parse_page(path.read_text())
    assert main(["report", str(run), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_unfinished_run_gets_its_report_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(status="interrupted", metrics_after=None)
    root = write_run(tmp_path / "run", run=values)
    assert main(["report", str(root)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "note: This run was stopped by its user after 100 steps.\n"
    assert "interrupted" in printed.out
    assert "interrupted" in parse_page((root / "report.html").read_text()).text


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("run.json", None, "a folder without one"),
        ("config.yaml", None, "readable config.yaml"),
        ("run.json", '{"status": "fin', "15 characters"),
        ("ranks.jsonl", '{"step": 1}\n', "in line 1"),
    ],
)
def test_a_broken_run_is_refused_and_nothing_is_written(
    run: Path, file: str, content: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    before = sorted(run.iterdir())
    assert main(["report", str(run)]) == 2
    assert told in refused(capsys)
    assert sorted(run.iterdir()) == before


def test_only_a_run_is_read_and_only_a_report_is_replaced(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "run.json").read_bytes()
    for arguments, told in {
        (run / "nowhere",): "nowhere, which is no folder",
        (run, "--output", run / "run.json"): "run.json, which is neither",
        (run, "--output", run): "which is a folder",
        (run, "--output", run / "run.json" / "page.html"): "must be a file that can be written",
        (): "Usage: dynlora report",
        (run, run): "Usage: dynlora report",
    }.items():
        assert main(["report", *map(str, arguments)]) == 2
        assert told in refused(capsys)
    assert (run / "run.json").read_bytes() == before
    assert not (run / "nowhere").exists()


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_help_comes_without_torch(verb: str) -> None:
    script = (
        f"import sys; from dynlora.cli.main import main; main(['{verb}', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    done = run_in_group([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.startswith(f"Usage: dynlora {verb}".encode())
