"""Run a job. Input errors are raised before the run's folder is changed."""

import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils.warning import PeftWarning
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor
from transformers import set_seed

from dynlora.distributed import process_count, process_rank, wait_for_processes
from dynlora.errors import ResumeError, RunFolderError
from dynlora.history import Event
from dynlora.input_adaptive.file import save_input_adaptive
from dynlora.report.rank_map import write_rank_map
from dynlora.report.results import outlook_lines
from dynlora.runs.checkpoints import SEAL, way_on
from dynlora.runs.folder import not_written
from dynlora.runs.record import RunRecord
from dynlora.train import processes
from dynlora.train.build import Job, build_job
from dynlora.train.config import METRICS, JobConfig
from dynlora.train.config_file import write_config
from dynlora.train.facts import first_facts, last_facts, outlook, report_of
from dynlora.train.machine import check_one_device, keep_freed_memory, peak_memory
from dynlora.train.methods.starts import write_difference
from dynlora.train.model_card import write_card
from dynlora.train.sharded import check_sharding, whole_weights
from dynlora.train.signals import Stopped
from dynlora.train.trackers import tracking
from dynlora.train.trainer import row_lengths

_REFUSED = ("iostream", "PytorchStreamWriter", "inline_container")
"""Words in torch's error messages for a full disk."""


def run_job(config: JobConfig, console: Console) -> tuple[dict[str, Any], list[Event]] | None:
    """Train, evaluate and write the run's folder; return its results and events.

    The first process writes, and returns them. Others only take part, and return None.

    Raises:
        DynamicLoraError: If model, data, configuration, machine or output folder do not fit.
        KeyboardInterrupt: If the user stops the run; after training has begun, the text contains
            the command to resume.
    """
    job = _begin(config, console)
    skipped = () if job.past is None else job.past.skipped
    for line in (*(f"skipped: {reason}" for reason in skipped), *outlook_lines(outlook(job))):
        console.print(line, highlight=False, soft_wrap=True)
    metrics_before = _metrics_before(job) if config.training.eval_on_start else {}
    if not processes.is_first():
        _train(job)
        whole_weights(job.prepared.model)
        _metrics_after(job)
        return None
    with job.folder.held():
        record = open_folder(job, metrics_before)
        with _recording_failures(job, record), _quiet_about_saving(config):
            _train(job)
            _save_model(job, whole_weights(job.prepared.model))
            metrics_before = metrics_before or _logged_metrics(job, 0)
            metrics_after = _metrics_after(job)
            if (dynamic := job.recorder.dynamic) is not None:
                write_rank_map(
                    dynamic.history,
                    job.folder.heatmap,
                    initial=job.recorder.initial_ranks,
                    budget=job.prepared.budget,
                    steps=job.trainer.state.global_step,
                )
            report = report_of(job, metrics_before, metrics_after)
            if config.method != "full":
                write_card(job, report)
            facts = last_facts(job, report)
            record.update(status="finished", metrics_before=metrics_before, **facts)
    return report, [] if dynamic is None else dynamic.history


def check_job(config: JobConfig, console: Console) -> tuple[dict[str, Any], dict[str, float]]:
    """Return a summary of the planned run and the metrics before training, without writing files.

    Raises:
        DynamicLoraError: As in `run_job`.
    """
    job = _begin(config, console)
    return outlook(job), _metrics_before(job)


def train_briefly(config: JobConfig) -> dict[str, int | None]:
    """Evaluate one batch of the longest rows, train, and return the peak memory; save no model."""
    job = _begin(config, Console(quiet=True))
    rows = job.inputs.data.validation
    lengths = row_lengths(rows)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    job.trainer.evaluate(rows.select(order[: config.training.eval_batch_size]))
    open_folder(job, {})
    _train(job)
    return peak_memory()


def _begin(config: JobConfig, console: Console) -> Job:
    """Set up the process and build the job, in all processes before one of them goes on."""
    if processes.in_group():
        processes.join_group()
        check_sharding(config)
    else:
        check_one_device()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    job = build_job(config, console)
    wait_for_processes()
    return job


def open_folder(job: Job, metrics_before: dict[str, float]) -> RunRecord:
    """Write the first files of the run's folder, which a new run clears; return the record."""
    folder, record = job.folder, RunRecord(job.folder.run)
    facts = first_facts(job)
    try:
        if job.begins_folder and not job.config.overwrite:
            folder.refuse_run()  # another run may have begun since the first check
        # First, because `run.json` marks the folder as a run's.
        record.update(status="running", **facts, metrics_before=metrics_before)
        if job.begins_folder:
            folder.clear()
        write_config(folder.config, job.config)
        job.recorder.open(job.past)
    except OSError as error:
        raise not_written(folder.root, error) from error
    return record


@contextmanager
def _recording_failures(job: Job, record: RunRecord) -> Iterator[None]:
    """Write the status of a run that does not finish; explain how to continue a stopped one."""
    try:
        with processes.explaining_loss(partial(_way_on, job)):
            yield
    except BaseException as error:
        cause = processes.announce_failure(error)
        if cause is None and isinstance(error, KeyboardInterrupt):
            state, signum = job.trainer.state, getattr(error, "signum", signal.SIGINT)
            with suppress(OSError):  # a full disk must not hide the message
                record.update(status="interrupted", steps=state.global_step)
            done = f"after {state.global_step} of {state.max_steps} steps"
            raise Stopped(f"{done}; {_way_on(job)}", signum) from None
        with suppress(OSError):
            steps = job.trainer.state.global_step
            told = cause or f"{type(error).__name__}: {error}"
            record.update(status="failed", steps=steps, error=told)
        raise
    finally:
        job.progress.progress.stop()


def _train(job: Job) -> None:
    past, config, stopping = job.past, job.config.training, job.stopping
    if past is not None:
        stopping.best = past.best
        # Several processes would not tell the sampler if they begin inside an epoch.
        job.trainer.sampler.set_epoch(past.epoch)
        if past.step >= job.inputs.steps or stopping.is_over(past.log):
            stopping.complete = job.trainer.sampler.closed = True
            told = f"the run is finished at step {past.step}: it is only evaluated and saved again"
            job.progress.console.print(told, highlight=False)
    if process_count() > 1:
        # Accelerate would not wrap a model that it has prepared for an evaluation.
        job.trainer.model._is_accelerate_prepared = False
    if processes.sharding_engine() is not None:  # the model is sharded only then
        job.trainer.args.eval_on_start = config.eval_on_start and past is None
    with tracking(
        job.trainer,
        config.report_to if processes.is_first() else (),
        job.folder.tracking,
        steps_done=0 if past is None else past.step,
        ranks=job.prepared.dynamic is not None,
    ):
        set_seed(config.seed + process_rank())  # so that processes do not drop out the same
        with stopping.listening(), _explaining_files(job):
            job.trainer.train(resume_from_checkpoint=None if past is None else str(past.checkpoint))
    wait_for_processes()  # the first may have to complete a checkpoint
    state = job.trainer.state
    if stopping.signum and state.global_step < state.max_steps:
        raise Stopped("", stopping.signum)


@contextmanager
def _explaining_files(job: Job) -> Iterator[None]:
    """Translate errors of torch and safetensors about checkpoints."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        checkpoint = job.folder.checkpoints / f"checkpoint-{job.trainer.state.global_step}"
        half_written = checkpoint.is_dir() and not (checkpoint / SEAL).exists()
        of_torch = isinstance(error, RuntimeError)
        damaged = isinstance(error, SafetensorError) and not half_written
        if damaged or isinstance(error, UnpicklingError):
            place = None if job.past is None else job.past.checkpoint
            raise ResumeError(
                f"the files of a checkpoint must be weights and plain values, got {place}, in "
                f"which one cannot be read as such ({str(error).splitlines()[0]}): resume from "
                "another one, or start again."
            ) from error
        if not half_written or (of_torch and not any(sign in str(error) for sign in _REFUSED)):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)  # frees disk space for `run.json`
        raise RunFolderError(
            f"a checkpoint must be written whole, but in {checkpoint} the disk refused "
            f"({error}): make room, then {_way_on(job)}."
        ) from error


def _way_on(job: Job) -> str:
    return way_on(job.folder.root, job.config.method, process_count(), processes.sharding_engine())


@contextmanager
def _quiet_about_saving(config: JobConfig) -> Iterator[None]:
    """Silence a warning: PEFT mistakes AdaLoRA layers of rank 0 for sharded ones."""
    with warnings.catch_warnings():
        if config.method == "adalora":
            warnings.filterwarnings("ignore", "Adapter .* have invalid shape", PeftWarning)
        yield


def _save_model(job: Job, weights: dict[str, Tensor] | None) -> None:
    """Save the full model, or the adapter as a stock PEFT adapter."""
    model, dynamic = job.prepared.model, job.recorder.dynamic
    if job.config.method == "full":
        model.save_pretrained(job.folder.full_model, state_dict=weights)
        job.inputs.processor.save_pretrained(job.folder.full_model)
    elif job.prepared.first is not None:
        write_difference(model, job.prepared.first, job.folder.adapter)
    else:
        model.save_pretrained(job.folder.adapter, state_dict=weights)
    if dynamic is not None and dynamic.input_adaptive is not None:
        save_input_adaptive(dynamic.input_adaptive, job.folder.adapter)


def _evaluate(job: Job, logged: dict[str, float] | None = None) -> dict[str, float]:
    """Return metrics without the prefix `eval_`, from a log entry or a new evaluation."""
    logged = logged or job.trainer.evaluate()
    return {name: logged[f"eval_{name}"] for name in METRICS[job.config.task]}


def _metrics_before(job: Job) -> dict[str, float]:
    """Return the metrics before training; a resumed run does not measure them again.

    A model that is sharded only in training has none yet.
    """
    past = {} if job.past is None else job.past.run
    return past.get("metrics_before") or ({} if processes.sharding_engine() else _evaluate(job))


def _metrics_after(job: Job) -> dict[str, float]:
    """Return the saved model's metrics, without a new evaluation if the last one was of it."""
    if job.config.training.load_best_model_at_end:
        job.recorder.of_best = True
        job.trainer.remove_callback(job.progress)  # it would print the wrong step
        return _evaluate(job)
    return _logged_metrics(job, job.trainer.state.global_step) or _evaluate(job)


def _logged_metrics(job: Job, step: int) -> dict[str, float]:
    """Return the metrics of the evaluation after a step; empty if there was none."""
    steps = {line["step"]: line for line in job.trainer.state.log_history if "eval_loss" in line}
    return _evaluate(job, steps[step]) if step in steps else {}
