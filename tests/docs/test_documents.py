"""The documents are true: their code runs, their commands parse, their links and names exist."""

import ast
import dataclasses
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

import dynlora
from dynlora import DynamicLora, schedule
from dynlora.adapters import attention as attention_rows
from dynlora.adjuster import MOST_TIMES_R
from dynlora.cli import compress
from dynlora.cli.job_parser import parse_job
from dynlora.config import METRICS, DynamicLoraConfig, load
from dynlora.fused import layers as fused
from dynlora.importance import attention_entropy
from dynlora.train.methods.starts import begin_with_eva
from tests.models import adamw, bare_llama, loss_of, sequences, train

FUSED = runpy.run_path(fused.__file__)  # the tests of forwards set its threshold to 0
DOCUMENTED = {
    "method": [
        ("for up to 256 evenly spaced tokens per example", attention_rows.QUERIES, 256),
        ("over sampled steps with a decay of 0.8", attention_entropy.DECAY, 0.8),
        ("in the forwards of every eighth observed step", schedule.FORWARDS_APART, 8),
        ("`q = max(max_rank, 8 · budget / Σc)`", MOST_TIMES_R, 8),
        ("fewer than 2^18 elements", FUSED["LEAST_ELEMENTS"], 2**18),
    ],
    "adapters": [("up to `--rows` texts (256 unless given)", compress.ROWS, 256)],
}
"""By document: its words, the number in the code, and what the words say."""
ROOT = Path(__file__).parent.parent.parent
HISTORY = sorted((ROOT / "docs" / "history").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


class Rows(Dataset):
    def __init__(self):
        self.tokens = next(sequences(batch=16))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def test_the_readmes_trainer_example_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[0]
    assert len(code.strip().splitlines()) <= 15
    arguments = TrainingArguments(
        output_dir="out", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    exec(code, {"base": bare_llama(), "args": arguments, "data": Rows()})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_readmes_loop_example_runs_as_it_stands(tiny_llama, capsys):
    code = blocks(ROOT / "README.md", "python")[1]
    assert len(code.strip().splitlines()) <= 15
    tokens = next(sequences())
    loader = [{"input_ids": tokens, "labels": tokens}] * 3
    exec(code, {"model": tiny_llama, "optimizer": adamw(tiny_llama), "loader": loader})
    assert "q_proj" in capsys.readouterr().out
    assert torch.isfinite(next(tiny_llama.parameters())).all()


def test_the_extension_of_the_documents_runs_as_it_stands(tiny_llama):
    (code,) = (b for b in blocks(ROOT / "docs" / "your-code.md", "python") if "attach" in b)
    names = {}
    exec(code, names)
    extension, optimizer = names["CountedForwards"](), adamw(tiny_llama)
    config = DynamicLoraConfig(total_steps=4)
    dynamic = DynamicLora(tiny_llama, optimizer, config, extensions=[extension])
    loss_of(tiny_llama, next(sequences()))
    assert extension.count == 1
    train(tiny_llama, optimizer, dynamic, 4)
    assert extension.count == 0
    dynamic.close()
    loss_of(tiny_llama, next(sequences()))
    assert extension.count == 0


def commands():
    lines = [line for path in DOCUMENTS for block in blocks(path, "console")
             for line in block.splitlines()]  # fmt: skip
    return [shlex.split(line) for line in lines if line.startswith("dynlora train examples/")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_train_command_in_the_documents_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse_job([word for word in command[2:] if word != "--dry-run"]) is not None


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for path in DOCUMENTS for t in re.findall(r"\bmake ([a-z-]+)`", path.read_text())}
    named |= {b.split()[1] for b in blocks(ROOT / "README.md", "console")[0].splitlines() if b}
    assert {"quickstart", "test"} <= named <= targets


@pytest.mark.parametrize("path", [*DOCUMENTS, *HISTORY], ids=lambda path: path.name)
def test_every_local_link_leads_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_function_named_in_the_method_exists():
    source = "\n".join(p.read_text() for p in (ROOT / "src" / "dynlora").rglob("*.py"))
    defined = {
        node.name
        for path in (ROOT / "src" / "dynlora").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:\w+\.)*(_?[a-zA-Z]\w*)`", text)
    known = {name for name in named if name in defined}
    assert len(known) >= 20
    for name in named:
        assert len(name) == 1 or re.search(rf"\b{name}\b", source), name


def test_every_public_name_and_metric_is_documented():
    for name in dynlora.__all__:
        assert inspect.getdoc(getattr(dynlora, name)), name
    for path in METRICS.values():
        assert inspect.getdoc(load(path)), path


def test_the_method_names_the_defaults_that_the_configuration_has():
    text = " ".join((ROOT / "docs" / "method.md").read_text(encoding="utf-8").split())
    config = DynamicLoraConfig()
    assert f"`T` = {config.temperature}, `m` = {config.uniform_mix}" in text
    assert f"`shrink_tolerance` = {config.shrink_tolerance}" in text
    assert f"1 + hysteresis` ({config.hysteresis})" in text
    assert (config.events, config.first_event, config.last_event) == (5, 0.05, 0.3)
    assert "five events, evenly spread between 5 % and 30 %" in text
    assert config.feature_weight == 0
    assert "the default weight is 0" in text


def test_every_setting_of_moving_ranks_is_in_the_methods_table_with_its_default():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.partition("## Settings")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(DynamicLoraConfig)}
    words = {"None": "null", "True": "true", "False": "false", "()": "none"}
    assert told == {
        name: f"`{value}`" if isinstance(value, str) else words.get(str(value), str(value))
        for name, value in defaults.items()
    }


def test_the_documents_give_the_numbers_that_the_code_has():
    for name, pairs in DOCUMENTED.items():
        told = " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())
        for words, value, expected in pairs:
            assert words in told, words
            assert value == expected, words


def test_eva_moves_no_rank_as_the_document_says():
    assert "EvaConfig(rho=1.0)" in inspect.getsource(begin_with_eva)
    assert "its `rho` is 1" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
