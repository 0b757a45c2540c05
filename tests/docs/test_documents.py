"""The documents are true: their code runs, links lead somewhere, and all names are documented."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import TrainingArguments

import dynlora
from benchmarks.concepts import draw
from dynlora import DynamicLora
from dynlora.config import METRICS, DynamicLoraConfig, load
from dynlora.report.svg import svg_file
from dynlora.train.config.keys import settings
from dynlora.train.config_file import read_job
from tests.models import adamw, bare_llama, loss_of, sequences, train

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "llms.txt")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = {"None": "null", "True": "true", "False": "false", "()": "none"}
"""Values of Python in the words of the documents."""


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "AGENTS.md"])
def test_the_trainer_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(
        output_dir="out", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in next(sequences(batch=16))]
    code = blocks(ROOT / page, "python")[0]
    exec(code, {"base": bare_llama(), "args": arguments, "data": rows})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_loop_example_of_the_readme_runs(tiny_llama, capsys):
    tokens = next(sequences())
    loader = [{"input_ids": tokens, "labels": tokens}] * 3
    code = blocks(ROOT / "README.md", "python")[1]
    exec(code, {"model": tiny_llama, "optimizer": adamw(tiny_llama), "loader": loader})
    assert "q_proj" in capsys.readouterr().out


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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_writes_under_runs(path):
    config = read_job(path)
    assert config.output == f"runs/{path.stem}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.enable_socket
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    """In the root of a checkout, as its first cell says; writes into `runs`."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", programs)
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": ROOT}}).execute()


def test_the_keys_for_people_from_other_tools_exist():
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:model|data|lora|training)\.\w+)", text)
    assert len(named) > 12
    assert set(named) <= settings().keys()


def test_the_figure_of_the_stages_is_what_its_command_writes():
    assert svg_file(draw()) + "\n" == (ROOT / "docs" / "stages.svg").read_text(encoding="utf-8")


def test_every_make_target_in_the_documents_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    named = set(re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, re.M))
    assert {"quickstart", "test"} <= named <= targets


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_local_link_leads_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_every_public_name_and_metric_is_documented():
    named = {name: getattr(dynlora, name) for name in dynlora.__all__}
    metrics = {path: load(path) for path in METRICS.values()}
    assert [name for name, value in (named | metrics).items() if not inspect.getdoc(value)] == []


def test_every_setting_of_moving_ranks_is_documented_with_its_default():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = text.partition("## Settings")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(DynamicLoraConfig)}
    assert told == {
        name: f"`{value}`" if isinstance(value, str) else NAMES.get(str(value), str(value))
        for name, value in defaults.items()
    }


def test_importing_with_an_untested_version_warns_and_goes_on(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "version", {"peft": "0.99.0", "transformers": "5.24.1"}.get
    )
    with pytest.warns(UserWarning, match=r"peft up to 0\.\d+, and 0\.99\.0") as caught:
        importlib.reload(dynlora)
    assert len(caught) == 1
