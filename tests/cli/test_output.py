"""What goes where: the result alone on the standard output, everything else on the other."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from dynlora.cli.messages import fewer_remarks, only_errors, readable_messages
from dynlora.cli.output import PIPED_WIDTH, Output
from tests.processes import run_in_group

Train = Callable[..., int]
Captured = pytest.CaptureFixture[str]
LONG = "base_model.model.transformer.encoder.layers.11.attention.self.query_key_value.projection"


def run(job: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `dynlora train` in a process of its own, with both streams piped."""
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return run_in_group(
        [sys.executable, "-m", "dynlora.cli.main", "train", str(job), *options],
        capture_output=True, text=True, env=kept | environment,
    )  # fmt: skip


def test_with_json_the_output_is_one_object_and_progress_is_elsewhere(job: Path) -> None:
    done = run(job, "--json")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    values = json.loads(done.stdout)
    assert values["method"] == "dynamic"
    assert values["after"].keys() == {"accuracy", "f1", "matthews", "loss"}
    assert "data: 48 training and 16 validation rows" in done.stderr
    assert "step 12/12: validation accuracy" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_with_quiet_nothing_is_printed_at_all(job: Path, output: Path) -> None:
    done = run(job, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (output / "run.json").is_file()


def test_with_both_only_the_result_is_printed(job: Path) -> None:
    done = run(job, "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["method"] == "dynamic"


@pytest.mark.parametrize("options", [(), ("--json",), ("--quiet",), ("--json", "--quiet")])
def test_an_error_is_one_line_on_the_standard_error_whatever_was_asked_for(
    options: tuple[str, ...], train: Train, capsys: Captured
) -> None:
    assert train("--lora.r", 0, *options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: `lora.r` must be at least 1, got 0.\n"


def test_without_options_a_piped_run_has_no_colour_and_whole_lines(job: Path) -> None:
    done = run(job)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    run_file = next(line for line in done.stdout.splitlines() if "all about the run" in line)
    assert str(job.parent / "run" / "run.json") in run_file, "the path is not broken up"


def show(console_environment: dict[str, str]) -> str:
    script = (
        "from rich.table import Table; from rich.text import Text\n"
        "from dynlora.cli.output import Output\n"
        "table = Table(); table.add_column('layer', style='bold red'); table.add_row(Text('q'))\n"
        "Output(as_json=False, quiet=False).show(table, {})"
    )
    unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = run_in_group(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env=kept | console_environment,
    )  # fmt: skip
    return done.stdout


def test_colours_follow_the_usual_environment_variables() -> None:
    assert "\x1b" not in show({"TERM": "xterm-256color"})
    coloured = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b[1;31m" in show(coloured)
    assert "31m" not in show(coloured | {"NO_COLOR": "1"})


def layers_table() -> Table:
    table = Table(title="layers")
    for heading in ("layer", "rank", "parameters", "energy"):
        table.add_column(heading)
    table.add_row(Text(LONG), "8", "12,288", "99.2 %")
    return table


def test_a_piped_table_shows_every_name_whole(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    Output(as_json=False, quiet=False).show(layers_table(), {})
    lines = capsys.readouterr().out.splitlines()
    assert any(LONG in line and "99.2 %" in line for line in lines)
    assert max(map(len, lines)) > PIPED_WIDTH


def test_a_width_that_is_asked_for_is_kept(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    Output(as_json=False, quiet=False).show(layers_table(), {})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


@pytest.mark.parametrize(
    ("as_json", "quiet", "printed"),
    [(False, False, "text\n"), (False, True, "text\n"), (True, True, '{"text": 1}\n')],
)
def test_a_text_for_a_file_is_printed_whatever_was_asked_for(
    as_json: bool, quiet: bool, printed: str, capsys: Captured
) -> None:
    Output(as_json=as_json, quiet=quiet).write("text", {"text": 1})
    assert capsys.readouterr().out == printed


def chatter() -> None:
    """Do what libraries do."""
    print("a library's remark")
    warnings.warn("a library's warning", stacklevel=1)
    logging.getLogger("some.dependency").warning("a library's log")
    logging.getLogger("dynlora.somewhere").warning("a note of ours with [brackets]")


def test_what_a_library_prints_goes_where_progress_goes(capsys: Captured) -> None:
    output = Output(as_json=True, quiet=False)
    with readable_messages(output.progress):
        with pytest.warns(UserWarning, match="a library's warning"):
            chatter()
        output.show(Text("table"), {"value": 1})
    printed = capsys.readouterr()
    assert printed.out == '{"value": 1}\n'
    assert "a library's remark" in printed.err
    assert "note: a note of ours with [brackets]" in printed.err


def test_a_quiet_verb_hears_nothing_of_libraries_but_errors(
    capsys: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    with only_errors(), readable_messages(Output(as_json=False, quiet=True).progress):
        chatter()
        logging.getLogger("some.dependency").error("something broke")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["something broke"]


def test_afterwards_everything_speaks_again(
    capsys: Captured, caplog: pytest.LogCaptureFixture
) -> None:
    with only_errors(), readable_messages(Output(as_json=False, quiet=True).progress):
        pass
    with pytest.warns(UserWarning, match="a library's warning"):
        chatter()
    assert "a library's remark" in capsys.readouterr().out
    assert "a library's log" in caplog.text


def test_remarks_on_being_loaded_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with fewer_remarks():
        logger.warning("not heard")
        logger.error("heard")
    logger.warning("heard again")
    assert [record.getMessage() for record in caplog.records] == ["heard", "heard again"]
