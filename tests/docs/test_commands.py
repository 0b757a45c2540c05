"""Every command in the documents runs, page by page and in order.

Examples keep their names, tasks and outputs, but have tiny models and data.
"""

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness.command import main as harness
from dynlora.cli.main import main
from tests.harness.records import invented_study, write
from tests.jobs import make_rows, save_model, write_job, write_rows
from tests.language import save_language_model
from tests.pictures import picture_rows, save_vit

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"dynlora": main, "python -m benchmarks": harness}
STARTS = ("quickstart", "mrpc")
"""Examples whose runs some pages need."""


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return a page's commands as program and arguments, without redirections."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        (program, shlex.split(line.removeprefix(program).partition(">")[0]))
        for line in lines
        for program in PROGRAMS
        if line.startswith(f"{program} ")
    ]


def rows_for(data: dict[str, Any], task: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows with the columns of an example."""
    if task == "image_classification":
        return picture_rows(count, seed=seed)
    made = []
    for row in make_rows(count, seed=seed):
        label = float(row["label"]) if task == "regression" else row["label"]
        made.append(
            {
                data.get("text", "text"): row["text"],
                data.get("text_pair") or "other": row["other"],
                data.get("label", "label"): label,
                data.get("prompt") or "p": row["text"],
                data.get("completion") or "c": row["other"],
            }
        )
    return made


def save_example(world: Path, source: Path) -> None:
    """Write an example of the same name, task, columns and output that trains in a second."""
    job = yaml.safe_load(source.read_text(encoding="utf-8"))
    task, data = job.get("task", "sequence_classification"), dict(job["data"])
    folder = world / "data" / source.stem
    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        name = data.get(f"{split}_split", split)
        write_rows(folder / f"{name}.parquet", rows_for(data, task, count, len(split)))
    kinds = {"image_classification": "images", "causal_lm": "language"}
    for key in ("name", "subset", "embedded"):
        data.pop(key, None)
    limits = {"max_train_rows": None, "max_validation_rows": None, "max_length": 24}
    if task == "causal_lm":
        limits["max_new_tokens"] = 4
    job["model"] = {"path": str(world / "models" / kinds.get(task, "minilm"))}
    job["data"] = data | limits | {"path": str(folder)}
    job["training"] = {"max_steps": 4, "batch_size": 8, "bf16": False, "eval": "steps"}
    write_job(world / "examples" / source.name, job)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with examples, models and the runs that pages need."""
    world = tmp_path_factory.mktemp("world")
    (world / "examples").mkdir()
    (world / "DATA").mkdir()  # the reader's folder in the pages
    save_model(world / "models" / "minilm")
    save_language_model(world / "models" / "language")
    save_vit(world / "models" / "images")
    for source in (ROOT / "examples").glob("*.yaml"):
        save_example(world, source)
    shutil.copytree(ROOT / "benchmarks" / "studies", world / "benchmarks" / "studies")
    write(world / "benchmarks" / "results", *invented_study(budgets=(2,), seeds=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for name in STARTS:
            assert main(["--quiet", "train", f"examples/{name}.yaml"]) == 0
    return world


@pytest.fixture
def world(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy without runs as the working folder."""
    copy = tmp_path / "world"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def provide(trained: Path, world: Path) -> Callable[[Sequence[str]], list[str]]:
    """Return a function that provides the runs of a command and fills its placeholders."""

    def given(words: Sequence[str]) -> list[str]:
        fitted = list(words)
        if words[0].startswith("benchmarks/studies"):
            fitted.append("--dry-run")  # a study takes hours, and its data
        for place, word in enumerate(words):
            found = re.match(r"runs/([\w-]+)", word)
            started = found and words[0] != "train" and not (world / found[0]).exists()
            if found and (started or "adapter" in word) and not (world / found[0]).exists():
                name = found[1] if found[1] in STARTS else STARTS[-1]
                shutil.copytree(trained / "runs" / name, world / found[0])
            if word == "DIR":
                example = Path(words[1]).stem
                kind = "data" if words[place - 1] == "--data.path" else "model"
                job = yaml.safe_load((world / "examples" / f"{example}.yaml").read_text())
                fitted[place] = job[kind]["path"]
        return fitted

    return given


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, provide: Callable[[Sequence[str]], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    for program, words in commands(page):
        code = PROGRAMS[program](provide(words))
        assert code == 0, f"{program} {shlex.join(words)}: {capsys.readouterr().err}"


def test_there_is_a_command_of_every_verb() -> None:
    from dynlora.cli.main import VERBS

    given = [command for page in PAGES for command in commands(page)]
    assert {words[0] for program, words in given if program == "dynlora"} >= set(VERBS)
    assert {program for program, _ in given} == set(PROGRAMS)
