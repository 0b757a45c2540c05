"""`python -m benchmarks report`: the report it writes from records alone, and what it refuses."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest

from benchmarks.harness.main import main
from tests.cli.conftest import snapshot
from tests.harness.report.records import invented_study, values, write

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


@pytest.fixture
def refused(report: Report, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of what must be refused; it returns the one line that is said."""

    def run(*arguments: object) -> str:
        before = snapshot(Path.cwd())
        capsys.readouterr()
        assert report(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert snapshot(Path.cwd()) == before
        return line.removeprefix("error: ")

    return run


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


def test_json_has_the_figures_files_and_every_comparison(report, results, capsys):
    assert report(results, "--output", "report.md", "--figures", "pictures", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == "report.md"
    assert {Path(path).parent for path in said["figures"]} == {Path("pictures")}
    assert all(Path(path).is_file() for path in said["figures"])
    first = said["studies"]["first"]
    assert (first["runs"], first["completed"]) == (36, 36)
    wanted = ("dynamic", "validation loss")
    loss = [c for c in first["comparisons"] if (c["method"], c["quantity"]) == wanted]
    assert [(c["budget"], c["pairs"], c["verdict"]) for c in loss] == [
        (2, 6, "no difference shown"), (8, 6, "no difference shown"),
    ]  # fmt: skip
    assert all(c["difference"] < 0 and c["p"] == 2 / 2**6 for c in loss)


def test_another_reference_can_be_chosen(report, results):
    assert report(results, "--reference", "random", "--output", "report.md") == 0
    text = Path("report.md").read_text(encoding="utf-8")
    assert "| against random |" in text
    assert "No run of random to compare others with." in text  # in the second study


def test_without_the_usual_reference_there_are_tables_and_no_comparison(report, tmp_path):
    write(tmp_path / "r", *invented_study(methods=("a", "b"), budgets=(8,), blocks=0))
    assert report(tmp_path / "r", "--output", "report.md") == 0
    text = Path("report.md").read_text(encoding="utf-8")
    assert "No run of lora to compare others with." in text
    assert "verdict" not in text.split("## Summary")[1]


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


def test_a_run_that_is_no_number_failed_or_collapsed_is_named(report, tmp_path):
    runs = invented_study(budgets=(8,), blocks=0)
    runs[1]["validation"]["loss"] = None
    runs[7]["collapsed"] = True
    runs[8] |= {"status": "failed", "error": "no [red]luck[/red]\nat all"}
    write(tmp_path / "r", *runs)
    assert report(tmp_path / "r", "--output", "report.md") == 0
    text = Path("report.md").read_text(encoding="utf-8")
    assert "not finite, and left out: lora, seed 1." in text
    assert "Collapsed to one class: dynamic, seed 1." in text
    assert r"dynamic, minilm, mrpc, budget 8, seed 2: failed: no \[red\]luck\[/red\] at all" in text


def test_names_with_signs_of_their_own_are_printed_as_they_are(report, tmp_path, capsys):
    name = "a [b] $x_1$ | <c>"
    runs = invented_study(name, ("lora", "[/x] $y", "_z"), budgets=(8,), blocks=1)
    write(tmp_path / "r", *runs)
    assert report(tmp_path / "r", "--output", "report.md") == 0
    assert name in capsys.readouterr().out
    text = Path("report.md").read_text(encoding="utf-8")
    assert r"## a \[b\] \$x_1\$ \| \<c\>" in text


def test_help_is_shown_without_reading_anything(report, capsys):
    assert report("--help") == 0
    assert "python -m benchmarks report" in capsys.readouterr().out


def test_quiet_prints_nothing(report, results, capsys):
    assert report(results, "--output", "report.md", "--quiet") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_folder_that_is_not_there_is_refused(refused):
    assert "got missing, which is not there" in refused("missing")
    assert "got benchmarks/results, which is not there" in refused()


def test_a_folder_without_records_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty, where there are none" in refused(tmp_path / "empty")


def test_a_broken_file_is_refused(refused, tmp_path):
    (write(tmp_path / "r", values()) / "first.config.json").write_text('{"format":')
    assert "must be the tables of a study's records, got Expecting" in refused(tmp_path / "r")


def test_a_record_without_a_key_is_refused(refused, tmp_path):
    run = values()
    del run["parameters"]
    write(tmp_path / "r", values(seed=1), run)
    assert "first.csv/final-0001 must hold `parameters`" in refused(tmp_path / "r")


def test_two_studies_of_one_name_are_refused(refused, tmp_path):
    write(tmp_path / "r", values())
    write(tmp_path / "copy", values(seed=1))
    said = refused(tmp_path / "r", tmp_path / "copy")
    assert "study 'first' must have one table of runs" in said


def test_two_records_of_one_run_are_refused(refused, tmp_path):
    write(tmp_path / "r", values(), values())
    assert "one final record of each run" in refused(tmp_path / "r")


def test_a_reference_that_no_study_has_is_refused_with_those_there_are(refused, results):
    said = refused(results, "--reference", "lroa")
    assert "got 'lroa': the records hold dynamic, lora, random, rslora" in said


def test_a_file_that_is_no_report_is_left_alone(refused, results):
    Path("notes.md").write_text("# Mine")
    assert "got notes.md, which is neither" in refused(results, "--output", "notes.md")


def test_a_folder_in_the_place_of_the_report_is_refused(refused, results):
    Path("docs").mkdir()
    assert "got docs, which is a folder" in refused(results, "--output", "docs")


def test_a_figure_in_the_place_of_which_another_file_lies_is_left_alone(refused, results):
    Path("report").mkdir()
    Path("report/second-minilm-mrpc-ranks.svg").write_text("<svg/>")
    said = refused(results, "--output", "report.md")
    assert "report/second-minilm-mrpc-ranks.svg must be a figure of an earlier report" in said


def test_a_file_in_the_place_of_the_figures_folder_is_refused(refused, results):
    Path("report").write_text("")
    assert "got report, which is a file" in refused(results, "--output", "report.md")


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_place_that_cannot_be_written_is_refused(refused, results):
    Path("locked").mkdir(mode=0o500)
    assert "locked" in refused(results, "--output", "locked/report.md")


def test_a_parent_that_is_a_file_is_refused(refused, results):
    Path("file").write_text("")
    said = refused(results, "--output", "file/report.md", "--figures", "pictures")
    assert "must be written to file/report.md and pictures" in said
    said = refused(results, "--output", "report.md", "--figures", "file/pictures")
    assert "must be written to report.md and file/pictures" in said


def test_one_place_for_the_document_and_its_figures_is_refused(refused, results):
    assert "got report for both" in refused(results, "--output", "report")


def test_links_lead_to_figures_in_any_folder(report, results):
    assert report(results, "--output", "a/report.md", "--figures", "b (1)/c") == 0
    text = Path("a/report.md").read_text(encoding="utf-8")
    links = [unquote(link) for link in re.findall(r"\]\(([^)]*)\)", text)]
    assert len(links) == 5
    assert all((Path("a") / link).is_file() for link in links)


@pytest.mark.parametrize("arguments", [["--reference"], ["--unknown"], ["--output", ""], [""]])
def test_arguments_that_say_nothing_are_refused(refused, arguments):
    assert "usage: python -m benchmarks report" in refused(*arguments)


@pytest.mark.parametrize("output", [".", ".."])
def test_an_output_that_is_the_folder_itself_is_refused(
    results: Path, report: Report, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(results, "--output", output) == 2
    assert "`--output` must be a file, got" in capsys.readouterr().err
