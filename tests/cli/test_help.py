"""What the command line says about itself: help, version, missing packages."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynlora.__main__ import PACKAGES
from dynlora.__main__ import main as entry
from dynlora.cli.main import VERBS, main
from dynlora.runs.record import release
from dynlora.train.config.keys import describe, settings
from tests.jobs import parse_job
from tests.processes import run_in_group

ROOT = Path(__file__).parents[2]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_verb(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for word in (*VERBS, "--version", "--json", "--quiet"):
        assert f" {word} " in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: Captured) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: dynlora {verb} [OPTIONS]")
    assert "--json" in text


def test_help_of_train_names_every_key_with_its_values_and_default(
    job: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", str(job), "-h"]) == 0, "help wins over a configuration"
    flat = " ".join(capsys.readouterr().out.split())
    for key, schema in settings().items():
        default = f"default: {json.dumps(schema['default'])}" if key != "output" else "required"
        assert f"--{key} VALUE" in flat
        assert f"({describe(schema)}; {default})" in flat
    assert "Rank of each layer; with `method: dynamic` the mean rank." in flat
    assert "--dry-run" in flat


def test_the_resolved_configuration_can_be_printed_without_training(
    job: Path, output: Path, tmp_path: Path, capsys: Captured
) -> None:
    options = ("--lora.r", "5", "--dynamic.preset", "paper")
    assert main(["train", str(job), *options, "--print_config"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert yaml.safe_load(again.read_text())["lora"]["r"] == 5
    assert parse_job(again) == parse_job(job, *options)
    assert not output.exists()


def test_the_version_comes_first_then_the_environment(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["dynlora", release()]
    monkeypatch.setattr("dynlora.cli.main.PACKAGES", ("torch", "no-such-package"))
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1\nGCC version: 12\n")
    for threads, shown, nvidia, found in (
        ("3", "3", tmp_path / "none", "none found"),
        ("", "as torch chooses", driver, "NVIDIA UNIX x86_64 Kernel Module  570.1"),
    ):
        monkeypatch.setattr("dynlora.cli.main.NVIDIA", nvidia)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert main(["--version", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["threads"], told["nvidia driver"]) == (shown, found)
        assert (told["torch"], told["no-such-package"]) == (version("torch"), "not installed")
        assert told["python"] == sys.version.partition(" ")[0]
        assert int(told["cpus"]) >= 1


def test_the_package_can_be_run_as_a_module() -> None:
    command = [sys.executable, "-m", "dynlora", "--version", "--json"]
    done = run_in_group(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["dynlora"] == release()


def test_help_version_schema_and_completion_do_not_wait_for_torch() -> None:
    script = (
        "import sys; from dynlora.cli.main import main\n"
        "for words in (['--version'], ['--help'], ['train', '--help'], ['schema'], "
        "['completion', 'bash']): assert main(words) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_entry_point_looks_for_the_packages_of_the_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {
        canonicalize_name(Requirement(each).name)
        for each in project["optional-dependencies"]["cli"]
    }
    distributions = packages_distributions()
    assert {canonicalize_name(distributions[name][0]) for name in PACKAGES} == extra


def test_a_missing_package_ends_in_one_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("dynlora.__main__.find_spec", lambda name: None if name == "trl" else name)
    assert entry() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "error: the command line needs trl: pip install 'dynlora[cli]'\n"
