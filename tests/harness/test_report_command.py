"""`python -m benchmarks report`: the written report, and refused input."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks.harness.command import main
from tests.harness.records import invented_study, values, write
from tests.jobs import snapshot

Report = Callable[..., int]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two studies; no test may change it."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    write(folder, *invented_study("first", blocks=1))
    few = invented_study("second", methods=("lora", "rslora"), budgets=(8,), seeds=1, blocks=1)
    write(folder, *few)
    return folder


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Return a runner of the verb in an empty folder; it returns the exit code."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *arguments: main(["report", *map(str, arguments)])


@pytest.fixture(scope="module")
def written(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report on both studies; no test may change it."""
    folder = tmp_path_factory.mktemp("written")
    assert main(["report", str(results), "--output", str(folder / "report.md")]) == 0
    return folder


@pytest.fixture
def here(report: Report, written: Path) -> None:
    """Put a report on both studies into the folder in which the verb runs."""
    shutil.copytree(written, Path.cwd(), dirs_exist_ok=True)


def test_the_defaults_read_benchmarks_results_and_write_into_runs(report, results, capsys):
    Path("benchmarks").mkdir()
    Path("benchmarks/results").symlink_to(results)
    assert report() == 0
    assert capsys.readouterr().err == ""
    text = Path("runs/results.md").read_text(encoding="utf-8")
    assert text.startswith("<!-- Written by `python -m benchmarks report`")
    assert "## first\n" in text
    assert "## second\n" in text
    figures = {path.name for path in Path("runs/results").iterdir()}
    drawn = {"first": ("curves", "differences", "ranks"), "second": ("curves", "ranks")}
    assert figures == {f"{s}-minilm-mrpc-{what}.svg" for s in drawn for what in drawn[s]}
    for figure in figures:
        assert f"](results/{figure})" in text


@pytest.mark.usefixtures("here")
def test_the_same_records_give_the_same_bytes_wherever_they_lie(report, results, tmp_path):
    first = snapshot(Path.cwd())
    copies = [tmp_path / name / f"{name}.csv" for name in ("second", "first")]
    for table in copies:
        table.parent.mkdir()
        for path in results.glob(f"{table.stem}.*"):
            shutil.copy(path, table.parent)
    shutil.rmtree("report")
    assert report(*copies, "--output", "report.md") == 0
    assert snapshot(Path.cwd()) == first


def test_json_has_the_figures_and_every_comparison_and_links_lead_to_any_folder(
    report, results, capsys
):
    assert report(results, "--output", "a/report.md", "--figures", "b (1)/c", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == "a/report.md"
    text = Path("a/report.md").read_text(encoding="utf-8")
    links = {(Path("a") / unquote(link)).resolve() for link in re.findall(r"\]\(([^)]*)\)", text)}
    assert links == {Path(path).resolve() for path in said["figures"]}
    assert len(links) == 5
    assert all(link.is_file() for link in links)
    first = said["studies"]["first"]
    assert (first["runs"], first["completed"]) == (36, 36)
    wanted = ("dynamic", "validation loss")
    loss = [c for c in first["comparisons"] if (c["method"], c["quantity"]) == wanted]
    assert [(c["budget"], c["pairs"], c["verdict"]) for c in loss] == [
        (2, 6, "no difference shown"), (8, 6, "no difference shown"),
    ]  # fmt: skip
    assert all(c["difference"] < 0 and c["p"] == 2 / 2**6 for c in loss)


@pytest.mark.usefixtures("here")
def test_a_figure_of_an_earlier_report_goes_and_others_stay(report, results):
    drawn = Path("report/first-minilm-mrpc-ranks.svg").read_bytes()
    Path("report/mine.svg").write_text("<svg/>")
    for name in ("old", "of another report"):
        Path(f"report/{name}.svg").write_bytes(drawn)
    with Path("report.md").open("a") as document:
        document.write("![once](report/old.svg) ![mine](report/mine.svg)")
    assert report(results, "--output", "report.md") == 0
    assert Path("report/mine.svg").exists()
    assert Path("report/of another report.svg").exists()
    assert not Path("report/old.svg").exists()


def test_names_with_markup_are_printed_unchanged(report, tmp_path, capsys):
    name = "a [b] $x_1$ | <c>"
    runs = invented_study(name, ("lora", "[/x] $y", "_z"), budgets=(8,), blocks=1)
    write(tmp_path / "r", *runs)
    assert report(tmp_path / "r", "--output", "report.md") == 0
    assert name in capsys.readouterr().out
    text = Path("report.md").read_text(encoding="utf-8")
    assert r"## a \[b\] \$x_1\$ \| \<c\>" in text


def test_another_reference_can_be_chosen_quietly(report, results, capsys):
    assert report(results, "--reference", "random", "--output", "report.md", "--quiet") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    text = Path("report.md").read_text(encoding="utf-8")
    assert "| against random |" in text
    assert "No run of random to compare others with." in text  # in the second study


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "but got missing, which does not exist"),
        ([], "but got benchmarks/results, which does not exist"),
        (["empty"], "but got empty, which has none"),
        (["file"], "but got file, which is neither"),
        (["broken"], "must be the tables of a study's records, but got Expecting"),
        (["{results}", "--reference", "lroa"], "got 'lroa': the records hold dynamic, lora"),
        (["{results}", "--output", "notes.md"], "got notes.md, which is neither"),
        (["{results}", "--output", "empty"], "got empty, which is a folder"),
        (
            ["{results}", "--output", "mine.md"],
            "second-minilm-mrpc-ranks.svg must be a figure",
        ),
        (["{results}", "--output", "file.md"], "got file, which is a file"),
        (["{results}", "--output", "report"], "got report for both"),
        (["{results}", "--output", "file/x.md"], "must be written to file/x.md and file/x"),
        (["{results}", "--output", ""], "Usage: python -m benchmarks report"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(report, results, capsys, arguments, message):
    Path("notes.md").write_text("# Mine")
    Path("file").write_text("")
    for folder in ("empty", "mine"):
        Path(folder).mkdir()
    Path("mine/second-minilm-mrpc-ranks.svg").write_text("<svg/>")
    (write(Path("broken"), values()) / "first.config.json").write_text('{"format":')
    before = snapshot(Path.cwd())
    assert report(*(word.replace("{results}", str(results)) for word in arguments)) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err
    assert snapshot(Path.cwd()) == before
