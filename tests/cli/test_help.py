"""What the command line says about itself: help, version, completion, missing packages."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from click.shell_completion import ShellComplete
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynlora.__main__ import PACKAGES
from dynlora.__main__ import main as entry
from dynlora.cli.completion import SHELLS, VARIABLE
from dynlora.cli.job_options import PATHS
from dynlora.cli.main import VERBS, dynlora, main
from dynlora.runs.record import release
from dynlora.train.config.keys import describe, settings
from tests.jobs import missing, parse_job
from tests.processes import run_in_group

ROOT = Path(__file__).parents[2]


def test_help_names_every_verb_and_every_verb_has_help(capsys):
    words = [f" {word} " for word in (*VERBS, "--version", "--json", "--quiet")]
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        assert missing(capsys.readouterr().out, *words) == []
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        assert missing(capsys.readouterr().out, f"Usage: dynlora {verb} [OPTIONS]", "--json") == []


def test_help_of_train_names_every_key_with_its_values_and_default(job, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", str(job), "-h"]) == 0, "help wins over a configuration"
    flat = " ".join(capsys.readouterr().out.split())
    for key, schema in settings().items():
        default = f"default: {json.dumps(schema['default'])}" if key != "output" else "required"
        assert missing(flat, f"--{key} VALUE", f"({describe(schema)}; {default})") == []
    told = "Rank of each layer; with `method: dynamic` the mean rank, | --dry-run"
    assert missing(flat, told) == []


def test_the_resolved_configuration_can_be_printed_without_training(job, output, tmp_path, capsys):
    options = ("--lora.r", "5", "--dynamic.preset", "paper")
    assert main(["train", str(job), *options, "--print_config"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert yaml.safe_load(again.read_text())["lora"]["r"] == 5
    assert parse_job(again) == parse_job(job, *options)
    assert not output.exists()


def test_the_version_comes_first_then_the_environment(capsys, said, monkeypatch, tmp_path):
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
        told = said("--version")
        assert (told["threads"], told["nvidia driver"]) == (shown, found)
        assert (told["torch"], told["no-such-package"]) == (version("torch"), "not installed")
        assert told["python"] == sys.version.partition(" ")[0]
        assert int(told["cpus"]) >= 1


def test_help_version_schema_and_completion_do_not_wait_for_torch():
    script = (
        "import sys; from dynlora.cli.main import VERBS, main\n"
        "for words in (['--version'], ['schema'], ['completion', 'bash'], ['--help'], "
        "*([verb, '--help'] for verb in VERBS)): assert main(words) == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_the_entry_point_looks_for_the_packages_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["cli"]
    distributions = packages_distributions()
    assert {canonicalize_name(distributions[name][0]) for name in PACKAGES} == {
        canonicalize_name(Requirement(each).name) for each in extra
    }


def test_a_missing_package_ends_in_one_line_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("dynlora.__main__.find_spec", lambda name: None if name == "trl" else name)
    assert entry() == 2
    told = "error: the command line needs trl: pip install 'dynlora[cli]'\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tra",), {"train"}),
        (("",), set(VERBS)),
        (("train", "mi"), {"file"}),
        (
            ("train", "mine.yaml", "--trai"),
            {f"--{key}" for key in settings() if key.startswith("training.")},
        ),
        (("train", "mine.yaml", "--dry"), {"--dry-run"}),
        (("train", "mine.yaml", "--method", ""), {"dynamic", "lora", "adalora", "full"}),
        (("train", "mine.yaml", "--training.bf16", ""), {"auto", "true", "false"}),
        (("train", "mine.yaml", "--model.quantization", ""), {"nf4", "int8", "null"}),
        (("train", "mine.yaml", "--output", "m"), {"dir"}),
        (("train", "mine.yaml", "--lora.r", "4", "--method", "f"), {"full"}),
        (("plan", "mine.yaml", "--lora.r"), {"--lora.r"}),
        (("report", "m"), {"dir"}),
        (("export", "models", "--format", "n"), {"native"}),
        (("combine", "a", "b", "--method", "t"), {"ties"}),
        (("completion", ""), set(SHELLS)),
        (("schema", "--q"), {"--quiet"}),
    ],
)
def test_verbs_options_keys_and_values_are_completed(words, expected):
    asked = ShellComplete(dynlora(), {}, "dynlora", VARIABLE)
    found = asked.get_completions(list(words[:-1]), words[-1])
    assert {item.value if item.type == "plain" else item.type for item in found} == expected
    assert PATHS.keys() <= settings().keys()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_loads_the_script_and_is_offered_a_key(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script, program = tmp_path / "dynlora.bash", tmp_path / "dynlora"
    script.write_text(capsys.readouterr().out)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dynlora "$@"\n')
    program.chmod(0o755)
    lines = (
        f"source {script}; COMP_WORDS=(dynlora train a.yaml --method d); COMP_CWORD=4; "
        "_dynlora_completion dynlora; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = run_in_group(
        ["bash", "--norc", "-c", lines],
        capture_output=True, text=True, check=True, env=os.environ | path,
    )  # fmt: skip
    assert (done.stdout.split(), done.stderr) == (["dynamic"], "")


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_gets_a_script_that_it_can_read(shell, tmp_path, said):
    values = said("completion", shell)
    assert values["shell"] == shell
    assert VARIABLE in values["script"]
    if shutil.which(shell) is None:
        pytest.skip(f"the script was written; reading it needs {shell}")
    (tmp_path / "script").write_text(values["script"])
    check = "--no-execute" if shell == "fish" else "-n"
    done = run_in_group([shell, check, str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
