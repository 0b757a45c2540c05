"""`dynlora completion SHELL`: the script is loaded by the shell itself, and completes."""

import json
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from dynlora.cli.completion import PATH_KEYS, command_parser
from dynlora.cli.job_parser import FLAGS, valid_keys
from dynlora.cli.main import main
from dynlora.cli.verbs import VERBS
from tests.processes import run_in_group

KEYS = [key for key, hint in valid_keys() if not is_dataclass(hint)]
DRIVER = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_dynlora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "dynlora.bash"
    command = [sys.executable, "-m", "dynlora.cli.main", "completion", "bash"]
    with path.open("w") as file:
        run_in_group(command, check=True, stdout=file)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "models").mkdir()
    return tmp_path


def complete(script: Path, folder: Path, *words: str) -> set[str]:
    """Return what bash offers for the last word of `dynlora WORDS`."""
    quoted = " ".join(f"'{word}'" for word in ("dynlora", *words))
    done = run_in_group(
        ["bash", "--norc", "-c", DRIVER.format(script=script, words=quoted)],
        capture_output=True, text=True, check=True, cwd=folder,
    )  # fmt: skip
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tra",), {"train"}),
        (("",), set(VERBS)),
        (("train", "mi"), {"mine.yaml"}),
        (("train", "mine.yaml", "--trai"), {f"--{k}" for k in KEYS if k.startswith("trai")}),
        (("train", "mine.yaml", "--dry"), {"--dry-run"}),
        (("train", "mine.yaml", "--method", ""), {"dynamic", "lora", "adalora", "full"}),
        (("train", "mine.yaml", "--method", "d"), {"dynamic"}),
        (("train", "mine.yaml", "--training.bf16", ""), {"auto", "true", "false"}),
        (("train", "mine.yaml", "--data.embedded", ""), {"stdlib", "null"}),
        (("train", "mine.yaml", "--output", ""), {"models"}),
        (("train", "mine.yaml", "--lora.r", "4", "--method", "f"), {"full"}),
        (("plan", "mine.yaml", "--lora.r"), {"--lora.r"}),
        (("report", "m"), {"models"}),
        (("report", "models", "--o"), {"--output"}),
        (("export", "models", "--format", "n"), {"native"}),
        (("completion", ""), {"bash", "zsh", "tcsh"}),
        (("schema", "--q"), {"--quiet"}),
    ],
)
def test_bash_offers(words: tuple[str, ...], offered: set[str], script: Path, folder: Path) -> None:
    assert complete(script, folder, *words) == offered


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["-n"]), ("tcsh", ["-f", "-n"])])
def test_other_shells_can_read_their_script(
    shell: str, check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    assert "training.learning_rate" in path.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"the script was written; reading it needs {shell}")
    done = run_in_group([shell, *check, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def options_of(verb: str) -> set[str]:
    (verbs,) = [action for action in command_parser()._actions if action.dest == "verb"]
    assert verbs.choices is not None
    parser = dict(verbs.choices)[verb]
    return {option for action in parser._actions for option in action.option_strings}


def test_every_verb_has_its_options_and_those_of_all() -> None:
    for verb in VERBS:
        assert {"--json", "--quiet", "--help"} <= options_of(verb), verb
    for verb in FLAGS:
        assert {f"--{key}" for key in KEYS} <= options_of(verb)
    assert "--dry-run" in options_of("train")
    assert "--dry-run" not in options_of("plan")


def test_keys_that_are_paths_exist() -> None:
    assert PATH_KEYS.keys() <= set(KEYS)


def test_the_script_is_one_value_with_json(
    script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["shell"] == "bash"
    assert values["script"].strip() == script.read_text().strip()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fish"], "invalid choice: 'fish' (choose from"),
        ([], "the following arguments are required: SHELL"),
        (["bash", "zsh"], "unrecognized arguments: zsh"),
    ],
)
def test_an_unknown_shell_is_told_those_known(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1


def test_it_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from dynlora.cli.main import main; main(['completion', 'bash']); "
        "assert 'torch' not in sys.modules"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
