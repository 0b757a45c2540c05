"""Every command in the documents runs, page by page and in order.

Examples keep their names, tasks and outputs, but have tiny models and data. A command that stands
on several pages runs once.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.command import main as harness
from dynlora.cli.init import QUESTIONS, TEMPLATE
from dynlora.cli.main import VERBS, main
from tests.harness.records import invented_study, write
from tests.jobs import make_rows, measure_here, save_model, write_job, write_rows
from tests.language import save_language_model
from tests.pictures import picture_rows, save_vit
from tests.towers import caption_rows, save_towers
from tests.vision_language import save_vision_language

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {"dynlora": main, "python -m benchmarks": harness}
STARTS = ("quickstart", "mrpc")
"""Examples whose runs some pages need."""
ENDS = {"watch": 130}
"""Exit statuses of verbs that only Ctrl-C ends."""


def commands(page):
    """Return a page's commands as program and arguments, without redirections."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [
        (program, shlex.split(line.removeprefix(program).partition(">")[0]))
        for line in lines
        for program in PROGRAMS
        if line.startswith(f"{program} ")
    ]


def rows_for(data, task, count, seed):
    """Return rows with the columns of an example."""
    if task == "image_classification":
        return picture_rows(count, seed=seed)
    if task in ("image_text_retrieval", "image_text_to_text"):
        rows = caption_rows(count, seed=seed)
        return [{data["image"]: row["image"], data["text"]: row["captions"]} for row in rows]
    return [
        {
            data.get("text", "text"): row["text"],
            data.get("text_pair") or "other": row["other"],
            data.get("label", "label"): float(row["label"])
            if task == "regression"
            else row["label"],
            data.get("prompt") or "p": row["text"],
            data.get("completion") or "c": row["other"],
        }
        for row in make_rows(count, seed=seed)
    ]


def save_example(world, source):
    """Write an example of the same name, task, columns and output that trains in a second."""
    job = yaml.safe_load(source.read_text(encoding="utf-8"))
    task, data = job.get("task", "sequence_classification"), dict(job["data"])
    folder = world / "data" / source.stem
    for split, count in (("train", 24), ("validation", 8), ("test", 8)):
        name = data.get(f"{split}_split", split)
        write_rows(folder / f"{name}.parquet", rows_for(data, task, count, len(split)))
    kinds = {
        "image_classification": "images",
        "causal_lm": "language",
        "image_text_retrieval": "towers",
        "image_text_to_text": "joined",
    }
    for key in ("name", "subset"):
        data.pop(key, None)
    limits = {"max_train_rows": None, "max_validation_rows": None, "max_length": 24}
    if task in ("causal_lm", "image_text_to_text"):
        limits["max_new_tokens"] = 4
    job["model"] = {"path": str(world / "models" / kinds.get(task, "minilm"))}
    job["data"] = data | limits | {"path": str(folder)}
    job["training"] = {"max_steps": 4, "batch_size": 8, "bf16": False, "eval": "no"}
    write_job(world / "examples" / source.name, job)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Change to a folder with examples, models and the results of a study."""
    world = tmp_path_factory.mktemp("world")
    (world / "examples").mkdir()
    (world / "DATA").mkdir()  # the reader's folder in the pages
    save_model(world / "models" / "minilm")
    save_language_model(world / "models" / "language")
    save_vit(world / "models" / "images")
    save_towers(world / "models" / "towers")
    save_vision_language(world / "models" / "joined")
    for source in (ROOT / "examples").glob("*.yaml"):
        save_example(world, source)
    shutil.copytree(ROOT / "benchmarks" / "studies", world / "benchmarks" / "studies")
    write(world / "benchmarks" / "results", *invented_study(budgets=(2,), seeds=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        measure_here(patch)
        answers = ("sequence_classification", "data/mrpc/train.parquet", "models/minilm", "large")
        given = dict(zip(QUESTIONS, (*answers, "short"), strict=True))
        asked = {question: given[name] for name, (question, _) in QUESTIONS.items()}
        patch.setattr("click.prompt", lambda question, *_, **__: asked[question])
        patch.setattr("dynlora.cli.init.TEMPLATE", TEMPLATE.replace("{length}", "24"))
        patch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # as after Ctrl-C
        patch.setattr("webbrowser.open", lambda url: True)
        yield world


@pytest.fixture(scope="module")
def once(world):
    """Return a runner of commands that have not run yet, which provides the runs they need."""
    done = set()

    def run(program, words):
        if (program, *words) in done:
            return 0
        found = None if words[0] == "train" and "examples" in words[1] else runs_in(words)
        if found and not Path("runs", found).exists():
            name = found if found in STARTS else STARTS[-1]
            assert run("dynlora", ["train", f"examples/{name}.yaml"]) == 0
            if name != found:
                shutil.copytree(f"runs/{name}", f"runs/{found}")
        study = words[0].startswith("benchmarks/studies")  # takes hours, and its data
        code = PROGRAMS[program]([*words, "--dry-run"] if study else words)
        if code == 0:
            done.add((program, *words))
        return code

    return run


def runs_in(words):
    """Return the name of the first run that a command reads."""
    names = [found[1] for word in words if (found := re.match(r"runs/([\w-]+)", word))]
    return names[0] if names else None


@pytest.mark.allow_hosts(["127.0.0.1"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page, once, capsys):
    for program, words in commands(page):
        code = once(program, words)
        told = f"{program} {shlex.join(words)}: {capsys.readouterr().err}"
        assert code == ENDS.get(words[0], 0), told


def test_there_is_a_command_of_every_verb():
    given = [command for page in PAGES for command in commands(page)]
    assert {words[0] for program, words in given if program == "dynlora"} >= set(VERBS)
    assert {program for program, _ in given} == set(PROGRAMS)
