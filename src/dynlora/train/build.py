"""Build a job: load and check everything in its configuration, without writing files."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from torch.optim import Optimizer
from transformers import TrainerCallback, set_seed

from dynlora.adapter_files.base_models import Source
from dynlora.distributed import process_count
from dynlora.errors import ConfigError
from dynlora.runs.folder import RunFolder
from dynlora.runs.resume import Past, check_same_task, find_past
from dynlora.train.callbacks import ProgressBar, Recorder, Stopping
from dynlora.train.config import METRICS, JobConfig, TrainingConfig
from dynlora.train.config_file import plain_values
from dynlora.train.data.language import pack
from dynlora.train.methods.prepare import Prepared, prepare
from dynlora.train.methods.starts import begin_with_eva, uses_eva
from dynlora.train.pretrained import locate, locate_teacher
from dynlora.train.processes import is_first, sharding_engine
from dynlora.train.task import Task, TaskData, label_names, load_data, make_trainer
from dynlora.train.tasks import TASKS
from dynlora.train.trackers import check_trackers
from dynlora.train.trainer import total_steps, validation_loss

ROWS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class JobInputs:
    """Data and base model of a job, the same for all methods."""

    task: Task
    source: Source
    processor: Any
    data: TaskData
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job, ready to train."""

    config: JobConfig
    folder: RunFolder
    past: Past | None  # checkpoint to resume from; None for a new run
    inputs: JobInputs
    prepared: Prepared
    trainer: Any  # a `transformers.Trainer` whose `sampler` is an `EpochSampler`
    recorder: Recorder
    stopping: Stopping
    progress: ProgressBar

    @property
    def begins_folder(self) -> bool:
        """Whether the run starts in an empty folder, not in the folder it resumes from."""
        return self.past is None or not self.past.is_in(self.folder)


def load_inputs(config: JobConfig) -> JobInputs:
    """Load the data of a job, and locate its base model."""
    task, source = TASKS[config.task], locate(config.model)
    processor = task.load_processor(source, config.data)
    data = load_data(task, config.data, processor)
    if config.training.packing:
        data = replace(data, train=pack(data.train, config.data.max_length))
    steps = total_steps(len(data.train), config.training, process_count())
    return JobInputs(task=task, source=source, processor=processor, data=data, steps=steps)


def prepare_method(
    inputs: JobInputs, config: JobConfig, checkpoint: Path | None = None
) -> Prepared:
    """Load the base model and prepare it for the method of `config`.

    With the same seed, all methods start with the same head, and `lora` and `dynamic` with the same
    adapter.
    """
    set_seed(config.training.seed)
    base = inputs.task.load_model(inputs.source, inputs.data.num_labels, inputs.processor)
    base.config.update(label_names(inputs.data.class_names, inputs.data.num_labels))
    inputs.task.check_model(base, config.data)
    inputs.task.begin_head(base, inputs.data)
    set_seed(config.training.seed)
    return prepare(base, config, inputs.steps, checkpoint)


def build_job(config: JobConfig, console: Console) -> Job:
    """Load and check everything in `config`, without writing files."""
    check_trackers(config.training.report_to)
    folder = RunFolder(Path(config.output))
    if is_first():  # because the check may lock the folder for a moment
        folder.check_usable()
    past = find_past(folder, plain_values(config))
    if past is None or not past.is_in(folder):
        paths = {"model.path": config.model.path, "data.path": config.data.path}
        folder.check_apart(paths | {"lora.start_from": config.lora.start_from})
    inputs = load_inputs(config)
    prepared = prepare_method(inputs, config, None if past is None else past.checkpoint)
    if past is not None:
        check_same_task(past, identity(inputs.data, prepared))
    best_metric = config.training.best_metric or METRICS[config.task][0]
    progress = ProgressBar(console, METRICS[config.task], prepared.dynamic)
    stopping = Stopping(best_metric, config.training.early_stopping_patience)
    recorder = Recorder(folder, prepared.dynamic, limit=config.training.save_total_limit)
    own = [progress, stopping, *([recorder] if is_first() else [])]
    trainer = build_trainer(inputs, config, prepared, own, folder.checkpoints)
    if past is None:
        if uses_eva(config.lora):
            began = time.perf_counter()
            begin_with_eva(trainer, prepared.model)
            prepared = replace(prepared, start_seconds=time.perf_counter() - began)
        recorder.train_seconds = prepared.start_seconds
    return Job(
        config=config,
        folder=folder,
        past=past,
        inputs=inputs,
        prepared=prepared,
        trainer=trainer,
        recorder=recorder,
        stopping=stopping,
        progress=progress,
    )


def build_trainer(
    inputs: JobInputs,
    config: JobConfig,
    prepared: Prepared,
    callbacks: Sequence[TrainerCallback],
    checkpoints: Path = Path(),
) -> Any:
    """Return the Trainer of a prepared method; `callbacks` run after the method's own."""
    source = locate_teacher(config.model)
    teacher = {} if source is None else {"teacher": _load_teacher(inputs, source, prepared.model)}
    trainer = make_trainer(
        inputs.task,
        config.training,
        inputs.processor,
        best_metric=config.training.best_metric or METRICS[config.task][0],
        checkpoints=checkpoints,
        penalty=prepared.penalty,
        model=prepared.model,
        train_dataset=inputs.data.train,
        eval_dataset=inputs.data.validation,
        callbacks=[*prepared.callbacks, *callbacks],
        optimizers=(_make_optimizer(prepared.model, config.training), None),
        **teacher,
    )
    if prepared.dynamic is not None:
        prepared.dynamic.validate = partial(validation_loss, trainer)
    return trainer


def _load_teacher(inputs: JobInputs, source: Source, model: Any) -> Any:
    teacher = inputs.task.load_model(source, None, None)
    own, theirs = (each.config.get_text_config().vocab_size for each in (model, teacher))
    if own != theirs:
        raise ConfigError(
            f"`model.teacher` must be a model of the same vocabulary, got {theirs} tokens in "
            f"{source.label} and {own} in the model: give another teacher."
        )
    return teacher


def _make_optimizer(model: Any, config: TrainingConfig) -> Optimizer | None:
    """Return AdamW with the groups of LoRA+ (Hayou and others 2024, arXiv 2402.12354), if set."""
    if config.loraplus_lr_ratio is None:
        return None
    return create_loraplus_optimizer(  # type: ignore[no-any-return]
        model,
        torch.optim.AdamW,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.loraplus_lr_ratio,
        weight_decay=config.weight_decay,
        fused=True,  # as in the Trainer; torch's default updates tensors one by one
    )


def identity(data: TaskData, prepared: Prepared) -> dict[str, Any]:
    """Return the values of `run.json` that must be equal when a run resumes."""
    return {
        "processes": process_count(),
        "engine": sharding_engine(),
        "rows": {"train": len(data.train), "validation": len(data.validation)},
        "rows_sha256": {"train": _digest(data.train), "validation": _digest(data.validation)},
        "num_labels": data.num_labels,
        "class_names": data.class_names,
        "budget": prepared.budget,
    }


def _digest(rows: Any) -> str:
    """Return the SHA-256 of a `datasets.Dataset`'s values, ignoring transforms and metadata."""
    found, plain = hashlib.sha256(), rows.with_format("arrow")
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        part = plain[begin : begin + ROWS_AT_ONCE].combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema.remove_metadata()) as stream:
            stream.write_table(part.replace_schema_metadata(None))
        found.update(sink.getvalue())
    return found.hexdigest()
