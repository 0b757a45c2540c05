"""Results on standard output, the rest on standard error; closed pipes, full disks, signals."""

import logging
import os
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from dynlora.cli.main import main
from dynlora.cli.output import Output, only_errors, readable_messages
from tests.processes import process_group, run_in_group

COMMAND = [sys.executable, "-m", "dynlora"]
LONG = "base_model.model.transformer.encoder.layers.11.attention.self.query_key_value.projection"
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
SPEAKING = [["schema", "--quiet"], ["--version"], ["inspect", "--help"]]
UNSET = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "PYTHONUNBUFFERED")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNSET}


def run_with(stdout, arguments):
    """Return the exit code and the standard error of a process that writes to a file descriptor."""
    done = run_in_group(
        [*COMMAND, *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", SPEAKING, ids=" ".join)
def test_a_closed_pipe_ends_the_verb_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run_with(writer, arguments) == (141, "")
    finally:
        os.close(writer)


def test_so_does_a_reader_that_leaves_in_the_middle():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_group([*COMMAND, "schema"], **pipes) as process:
        assert process.stdout.read(5) == b'{\n  "'
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) in {(b"", 141), (b"", 0)}


@needs_full
@pytest.mark.parametrize("arguments", SPEAKING, ids=" ".join)
def test_a_full_disk_is_one_line(arguments):
    with FULL.open("wb") as full:
        code, told = run_with(full.fileno(), arguments)
    assert code == 2
    assert told.startswith("error: standard output must be writable, but got No space left on")
    assert told.count("\n") == 1


@needs_full
def test_progress_that_cannot_be_written_does_not_stop_a_run(job, output):
    train = [*COMMAND, "train", str(job), "--method", "lora", "--training.max_steps", "2"]
    with FULL.open("w") as full:
        done = run_in_group(train, stdout=subprocess.PIPE, stderr=full, text=True, env=ENVIRONMENT)
        refused = run_in_group([*COMMAND, "train", "no.yaml"], stderr=full, env=ENVIRONMENT)
    assert done.returncode == 0
    assert "accuracy" in done.stdout
    assert "\x1b" not in done.stdout
    line = next(line for line in done.stdout.splitlines() if "all about the run" in line)
    assert str(output / "run.json") in line, "the path is not broken up"
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert refused.returncode == 2, "the exit code reports an error that cannot be written"


def test_an_error_after_a_full_disk_is_told(tmp_path, monkeypatch):
    path, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("w") as log:
        monkeypatch.setattr("sys.stderr", log)
        output = Output(as_json=False, quiet=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            output.progress.print("progress")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert main(["train", "no.yaml"]) == 2
    assert path.read_text().startswith("error: ")


@needs_full
def test_an_error_without_standard_error_keeps_its_exit_code():
    words = [*COMMAND, "train", "no.yaml"]
    done = run_in_group(["bash", "-c", '"$@" 2>&- >/dev/full', "bash", *words], env=ENVIRONMENT)
    assert done.returncode == 2


LATER = """
import sys, warnings
from dynlora.cli.main import run_command
def speak(_, output):
    output.progress.print("progress")
    warnings.warn("of a library")
sys.exit(run_command([], speak))
"""


@needs_full
def test_a_warning_after_a_full_disk_keeps_the_exit_code():
    with FULL.open("w") as full:
        done = run_in_group([sys.executable, "-c", LATER], stderr=full, env=ENVIRONMENT)
    assert done.returncode == 0


@pytest.mark.parametrize("options", [[], ["--json", "--quiet"]])
def test_a_process_without_standard_output_runs(options):
    words = [*COMMAND, "--version", *options]
    done = run_in_group(["bash", "-c", '"$@" >&-', "bash", *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_elsewhere_keeps_its_traceback(monkeypatch):
    def speak_to_a_worker(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("dynlora.cli.schema.job_schema", speak_to_a_worker)
    with pytest.raises(BrokenPipeError):
        main(["schema"])


@pytest.mark.parametrize(("method", "text"), [("show", Text("")), ("write", "")])
def test_numbers_that_are_not_finite_are_null(method, text, capsys):
    values = {"loss": float("nan"), "layers": [{"energy": float("inf")}]}
    getattr(Output(as_json=True, quiet=False), method)(text, values)
    assert capsys.readouterr().out == '{"loss": null, "layers": [{"energy": null}]}\n'


def test_characters_that_cannot_be_encoded_are_escaped(tmp_path):
    path = tmp_path / "out"
    with path.open("w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        Output(as_json=False, quiet=False).show(Text("a name: \ud800"), {})
    assert path.read_text(encoding="utf-8") == "a name: \\ud800\n"


def show_layers():
    table = Table(title="layers")
    for heading in ("layer", "rank", "parameters", "energy"):
        table.add_column(heading, style="bold red")
    table.add_row(Text(LONG), "8", "12,288", "99.2 %")
    Output(as_json=False, quiet=False).show(table, {})


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, False), ({"FORCE_COLOR": "1"}, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False)],
)
def test_colours_follow_the_usual_environment_variables(environment, coloured, capsys, monkeypatch):
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"TERM": "xterm-256color"}).items():
        monkeypatch.setenv(name, value)
    show_layers()
    assert ("31m" in capsys.readouterr().out) == coloured


def test_a_piped_table_shows_names_whole_unless_a_width_is_set(capsys, monkeypatch):
    show_layers()
    lines = capsys.readouterr().out.splitlines()
    assert any(LONG in line and "99.2 %" in line for line in lines)
    assert max(map(len, lines)) > 100
    monkeypatch.setenv("COLUMNS", "60")
    show_layers()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def chatter():
    print("a library's remark")
    warnings.warn("a library's warning", stacklevel=1)
    logging.getLogger("some.dependency").warning("a library's log")
    logging.getLogger("dynlora.somewhere").warning("a note of ours with [brackets]")


def test_output_of_libraries_goes_to_standard_error(capsys):
    output = Output(as_json=True, quiet=False)
    with readable_messages(output.progress):
        with pytest.warns(UserWarning, match="a library's warning"):
            chatter()
        output.show(Text("table"), {"value": 1})
    printed = capsys.readouterr()
    assert printed.out == '{"value": 1}\n'
    assert "a library's remark" in printed.err
    assert "note: a note of ours with [brackets]" in printed.err


def test_progress_shows_names_as_they_are(capsys):
    progress = Output(as_json=False, quiet=False).progress
    progress.print("skipped: runs/[red]job/:smile:/checkpoint-2", soft_wrap=True)
    assert capsys.readouterr().err == "skipped: runs/[red]job/:smile:/checkpoint-2\n"


def test_a_quiet_verb_hides_everything_of_libraries_but_errors_and_only_while_it_runs(
    capsys, caplog
):
    with only_errors(), readable_messages(Output(as_json=False, quiet=True).progress):
        chatter()
        logging.getLogger("some.dependency").error("something broke")
    assert capsys.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == ["something broke"]
    with pytest.warns(UserWarning, match="a library's warning"):
        chatter()
    assert "a library's remark" in capsys.readouterr().out
    assert "a library's log" in caplog.text


def test_remarks_on_import_are_left_out(caplog, capsys):
    assert main(["schema"]) == 0
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("not heard")
    logger.error("heard")
    assert [record.getMessage() for record in caplog.records] == ["heard"]


@pytest.fixture
def usual_sigterm():
    """Let SIGTERM end the process, as without a handler."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("usual_sigterm")
def test_sigterm_ends_a_verb_with_one_line_and_its_exit_code(
    finished, tmp_path, monkeypatch, capsys
):
    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("dynlora.train.finished_run.evaluate_run", terminated)
    assert main(["eval", str(finished)]) == 143
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == "interrupted: before anything was written"
    monkeypatch.setattr("dynlora.adapter_files.writer.write_tensors", terminated)
    arguments = ["export", finished / "adapter", "--format", "native", "--output", tmp_path / "out"]
    assert main([str(argument) for argument in arguments]) == 143
    assert list(tmp_path.iterdir()) == [], "no half of a folder"
