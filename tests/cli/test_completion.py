"""`dynlora completion SHELL`: scripts for shells, and what a shell is offered."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from dynlora.cli.completion import SHELLS, VARIABLE
from dynlora.cli.job_options import PATHS
from dynlora.cli.main import VERBS, dynlora, main
from dynlora.train.config.keys import settings
from tests.processes import run_in_group

TRAINING = {f"--{key}" for key in settings() if key.startswith("training.")}


def offered(*words: str) -> set[str]:
    """Return what is offered for the last of the words after `dynlora`."""
    asked = ShellComplete(dynlora(), {}, "dynlora", VARIABLE)
    found = asked.get_completions(list(words[:-1]), words[-1])
    return {item.value if item.type == "plain" else item.type for item in found}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tra",), {"train"}),
        (("",), set(VERBS)),
        (("train", "mi"), {"file"}),
        (("train", "mine.yaml", "--trai"), TRAINING),
        (("train", "mine.yaml", "--dry"), {"--dry-run"}),
        (("train", "mine.yaml", "--method", ""), {"dynamic", "lora", "adalora", "full"}),
        (("train", "mine.yaml", "--training.bf16", ""), {"auto", "true", "false"}),
        (("train", "mine.yaml", "--data.embedded", ""), {"stdlib", "null"}),
        (("train", "mine.yaml", "--output", "m"), {"dir"}),
        (("train", "mine.yaml", "--lora.r", "4", "--method", "f"), {"full"}),
        (("plan", "mine.yaml", "--lora.r"), {"--lora.r"}),
        (("report", "m"), {"dir"}),
        (("export", "models", "--format", "n"), {"native"}),
        (("completion", ""), set(SHELLS)),
        (("schema", "--q"), {"--quiet"}),
    ],
)
def test_verbs_options_keys_and_values_are_offered(
    words: tuple[str, ...], expected: set[str]
) -> None:
    assert offered(*words) == expected


def test_keys_that_are_paths_exist() -> None:
    assert PATHS.keys() <= settings().keys()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_loads_the_script_and_is_offered_a_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize(("shell", "check"), [("zsh", "-n"), ("fish", "--no-execute")])
def test_other_shells_can_read_their_script(
    shell: str, check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["shell"] == shell
    assert VARIABLE in values["script"]
    if shutil.which(shell) is None:
        pytest.skip(f"the script was written; reading it needs {shell}")
    (tmp_path / "script").write_text(values["script"])
    done = run_in_group([shell, check, str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
