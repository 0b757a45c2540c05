"""`dynlora --version`: what a bug report needs, at once."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dynlora.cli import version as verb
from dynlora.cli.main import main
from dynlora.runs.release import release
from tests.processes import run_in_group


def test_it_tells_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    for package in ("torch", "transformers", "peft"):
        assert told[package] == version(package)
    assert told["dynlora"] == release()
    assert told["python"] == sys.version.partition(" ")[0]
    assert int(told["cpus"]) >= 1


def test_the_package_can_be_run_as_a_module() -> None:
    command = [sys.executable, "-m", "dynlora", "--version", "--json"]
    done = run_in_group(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["dynlora"] == release()


def test_the_version_itself_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["dynlora", release()]


def test_threads_are_those_of_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, told in (("3", "3"), ("", "as torch chooses")):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert main(["--version", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["threads"] == told


def test_a_driver_is_told_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(verb, "NVIDIA", driver)
    assert main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nvidia driver"] == "none found"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1\nGCC version: 12\n")
    assert main(["--version", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["nvidia driver"]
    assert told == "NVIDIA UNIX x86_64 Kernel Module  570.1"


def test_a_package_that_is_not_there_is_said_to_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "PACKAGES", ("dynlora", "no-such-package"))
    assert main(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["no-such-package"] == "not installed"


def test_no_library_is_imported_for_it() -> None:
    script = (
        "import sys; from dynlora.cli.main import main; main(['--version']); "
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
