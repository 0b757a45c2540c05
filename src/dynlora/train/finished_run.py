"""Load a finished run, and evaluate it on any labelled rows with the Trainer used in training."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynlora.adapter_files.adapter_base import attach, check_fits
from dynlora.adapter_files.reader import read_adapter
from dynlora.runs.folder import RunFolder
from dynlora.runs.reader import check_finished
from dynlora.runs.record import read_record
from dynlora.train.config import METRICS, JobConfig
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import reload_in_float32
from dynlora.train.pretrained import locate
from dynlora.train.task import Task, label_names, make_trainer
from dynlora.train.tasks import TASKS
from dynlora.train.tasks.sequence import PROBLEMS

ONE_CLASS_A_ROW = ("sequence_classification", "image_classification")
"""Tasks with a single class per row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A finished run, loaded."""

    config: JobConfig
    task: Task
    processor: Any
    model: Any  # the base model with the saved adapter, or the saved full model
    num_labels: int | None  # outputs of the model's head; None if the task has no head
    class_names: Sequence[str] | None


def outputs_of(adapter: Path) -> dict[str, Any]:
    """Return problem type and label names for a model's configuration, if a run has the adapter.

    Raises:
        RunFileError: If a value of the run's `run.json` has the wrong type.
    """
    folder = RunFolder(adapter.absolute().parent)
    if folder.adapter != adapter.absolute() or not folder.run.is_file():
        return {}
    facts = read_record(folder.run)
    said: dict[str, Any] = {}
    if facts.get("task") in PROBLEMS:
        said["problem_type"] = PROBLEMS[facts["task"]]
    return said | label_names(facts.get("class_names"), facts.get("num_labels"))


def load_run(folder: RunFolder, config: JobConfig) -> FinishedRun:
    """Load a finished run; `config` may have another path of the base model than the folder's.

    Raises:
        RunFileError: If the run is not finished, or one of its files or values is missing or wrong.
        ConfigError: If the base model or processor cannot be loaded.
        AdapterError: If the adapter is broken, or does not fit the base model.
    """
    facts, task = check_finished(folder), TASKS[config.task]
    num_labels = facts.get("num_labels")
    full = config.method == "full"
    saved = replace(config.model, path=str(folder.full_model), gguf_file=None, quantization=None)
    source = locate(saved if full else config.model)
    processor = task.load_processor(source, config.data)
    base = task.load_model(source, num_labels, processor)
    return FinishedRun(
        config=config,
        task=task,
        processor=processor,
        model=base.eval() if full else _with_adapter(base, folder.adapter, config),
        num_labels=num_labels,
        class_names=facts.get("class_names"),
    )


def _with_adapter(base: Any, folder: Path, config: JobConfig) -> Any:
    """Return the model with its adapter, checked first if it is plain LoRA."""
    if config.method != "adalora" and not config.lora.use_dora:
        check_fits(read_adapter(folder), base)
    model = attach(folder, base)
    with warnings.catch_warnings():
        # peft 0.21 mistakes AdaLoRA's masks for rank patterns, and layers of rank 0 for sharded
        # ones.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        warnings.filterwarnings("ignore", "Adapter .* have invalid shape")
        reload_in_float32(model, folder)
    return model.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Result of an evaluation."""

    rows: int
    cut: int
    metrics: Mapping[str, float]  # by name, in the order of `config.METRICS`
    classes: Sequence[Mapping[str, Any]]
    """`name`, and rows `labelled` and `predicted`, per class; empty without one class per row."""

    @property
    def collapsed(self) -> int | None:
        """Class predicted for every row although labels differ; None if there is no such class."""
        given = [place for place, count in enumerate(self.classes) if count["predicted"]]
        true = sum(count["labelled"] > 0 for count in self.classes)
        return given[0] if len(given) == 1 and true > 1 else None


def evaluate_run(run: FinishedRun, split: RawSplit, batch_size: int | None = None) -> Evaluation:
    """Evaluate a finished run's model on labelled rows.

    Without `batch_size`, the run's own counts, which reproduces its metrics.

    Raises:
        DataError: If a column is missing or a row is invalid for the task.
        NonFiniteError: If the loss is not finite.
    """
    task, training = run.config.task, run.config.training
    if batch_size is not None:
        training = replace(training, eval_batch_size=batch_size)
    split = replace(split, class_names=run.class_names)
    rows = run.task.read_split(split, run.config.data, run.processor, run.num_labels)
    trainer = make_trainer(
        run.task,
        training,
        run.processor,
        best_metric=METRICS[task][0],
        model=run.model,
        train_dataset=rows.inputs,
        eval_dataset=rows.inputs,
    )
    found = trainer.predict(rows.inputs, metric_key_prefix="eval")
    classes = []
    if task in ONE_CLASS_A_ROW:
        names = dict(enumerate(run.class_names or ()))
        labelled = Counter(found.label_ids.tolist())
        predicted = Counter(found.predictions.argmax(axis=-1).tolist())
        classes = [
            {"name": names.get(label), "labelled": labelled[label], "predicted": predicted[label]}
            for label in range(run.num_labels or 0)
        ]
    return Evaluation(
        rows=len(rows.inputs),
        cut=rows.cut,
        metrics={name: found.metrics[f"eval_{name}"] for name in METRICS[task]},
        classes=classes,
    )
