"""A standard output whose reader has left, a disk that is full, numbers that JSON has not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.text import Text

from dynlora.cli.main import main
from dynlora.cli.output import Output
from tests.processes import process_group, run_in_group

COMMAND = [sys.executable, "-m", "dynlora.cli.main"]
FULL = Path("/dev/full")
SPEAKING = [
    ["schema"],
    ["schema", "--json"],
    ["schema", "--quiet"],
    ["completion", "bash"],
    ["--version"],
    ["--version", "--json"],
    ["--help"],
    ["inspect", "--help"],
]


def run_with(stdout: int, arguments: list[str]) -> tuple[int, str]:
    """Return the exit code and the standard error of a process that writes to a file descriptor."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = run_in_group(
        [*COMMAND, *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env=kept,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("arguments", SPEAKING, ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_the_verb_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run_with(writer, arguments) == (141, "")
    finally:
        os.close(writer)


def test_so_does_one_that_leaves_in_the_middle() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process_group([*COMMAND, "schema"], **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b'{\n  "'
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) in {(b"", 141), (b"", 0)}


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", SPEAKING, ids=" ".join)
def test_a_full_disk_is_one_line(arguments: list[str]) -> None:
    with FULL.open("wb") as full:
        code, said = run_with(full.fileno(), arguments)
    assert code == 2
    assert said.startswith("error: the standard output must take the result, got No space left on")
    assert said.count("\n") == 1


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_progress_that_nobody_can_take_costs_no_run(job: Path, output: Path) -> None:
    with FULL.open("w") as full:
        command = [*COMMAND, "train", str(job), "--method", "lora"]
        done = run_in_group(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 0
    assert "accuracy" in done.stdout
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_an_error_that_nobody_can_take_is_told_by_the_exit_code() -> None:
    with FULL.open("w") as full:
        done = run_in_group([*COMMAND, "train", "no.yaml"], stderr=full)
    assert done.returncode == 2


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_a_closed_standard_output_is_no_bug(as_json: bool, quiet: bool) -> None:
    words = ["--version", *["--json"] * as_json, *["--quiet"] * quiet]
    done = run_in_group(
        ["bash", "-c", '"$@" >&-', "bash", *COMMAND, *words],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("method", ["show", "write"])
def test_numbers_that_are_not_finite_are_null(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Output(as_json=True, quiet=False)
    values = {"loss": float("nan"), "layers": [{"energy": float("inf")}]}
    if method == "show":
        output.show(Text(""), values)
    else:
        output.write("", values)
    assert capsys.readouterr().out == '{"loss": null, "layers": [{"energy": null}]}\n'


def test_a_broken_pipe_elsewhere_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def speak_to_a_worker(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("dynlora.cli.main._dispatch", speak_to_a_worker)
    with pytest.raises(BrokenPipeError):
        main(["schema"])


def test_what_has_no_bytes_in_the_outputs_encoding_is_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        Output(as_json=False, quiet=False).show(Text("a name: \ud800"), {})
    assert path.read_text(encoding="utf-8") == "a name: \\ud800\n"
