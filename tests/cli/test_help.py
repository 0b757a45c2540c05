"""What the command line says about itself, and that the examples it comes with are valid."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dynlora.cli.job_parser import parse_job, valid_keys
from dynlora.cli.main import main
from dynlora.train.config import LoraSettings
from tests.processes import run_in_group

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_the_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "train CONFIG" in text
    assert "--version" in text


def test_version_comes_with_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["dynlora"].strip().startswith(version("dynlora"))
    assert lines["torch"].strip() == version("torch")
    assert {"python", "platform", "transformers", "peft"} <= lines.keys()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_train_names_every_key_and_its_default(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["train", option]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: dynlora train CONFIG [--output DIR] [--dotted.key value ...]")
    for key, hint in valid_keys():
        section = hasattr(hint, "__dataclass_fields__")
        assert (re.search(rf"--{re.escape(key)} ", text) is None) == section, key
    flat = " ".join(text.split())
    assert "Rank of each layer; with `method: dynamic` their mean." in flat
    assert "(type: a whole number, default: 8)" in flat
    assert "(type: one of nf4, int8 or null, default: null)" in flat
    assert not re.search(r"\b(Literal|Optional|Union|tuple|int|float|bool)\b", flat)
    assert "CONFIG  " not in text, "sections cannot be given as files"


def test_help_wins_over_a_configuration(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(job), "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dynlora train")


def test_the_configuration_can_be_printed_without_training(
    job: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(job), "--lora.r", "5", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    lora = LoraSettings(r=5, lora_alpha=4.0)
    assert printed["lora"] == json.loads(json.dumps(asdict(lora)))
    assert not output.exists()


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"quickstart.yaml", "mrpc.yaml"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path: Path) -> None:
    config = parse_job([str(path)])
    assert config is not None
    assert Path(config.output).parts[0] == "runs", "ignored by git, removed by `make clean`"


def test_the_mrpc_example_has_the_settings_its_results_were_got_with() -> None:
    config = parse_job([str(path) for path in EXAMPLES if path.name == "mrpc.yaml"])
    assert config is not None
    assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (8, 16, 0)
    assert set(config.lora.target_modules) == {"query", "key", "value", "dense"}
    assert (config.training.epochs, config.training.batch_size) == (3, 32)
    assert config.training.learning_rate == 1e-3
    assert (config.training.warmup_ratio, config.training.max_grad_norm) == (0.06, 1)
    assert config.data.max_length == 128


def test_help_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from dynlora.cli.main import main; main(['train', '--help']); "
        "assert 'torch' not in sys.modules"
    )
    run_in_group([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
