"""Run a job: train from a configuration, write the run's folder, and return a report.

Input errors are raised before the folder is changed: while the job is built, or in the evaluation
before training.
"""

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft.utils.warning import PeftWarning
from rich.console import Console
from safetensors import SafetensorError
from transformers import set_seed

from dynlora.errors import EngineError, ResumeError, RunFolderError
from dynlora.input_adaptive.file import save_input_adaptive
from dynlora.report.heatmap import write_heatmap
from dynlora.report.outlook import Outlook
from dynlora.report.summary import RunReport
from dynlora.runs.checkpoints import PROGRESS, can_resume, finish_command
from dynlora.runs.folder import not_written
from dynlora.runs.record import RunRecord, machine, peak_memory, versions
from dynlora.runs.resume import complete_checkpoints
from dynlora.train.build import Job, build_job, identity
from dynlora.train.config import METRICS, JobConfig
from dynlora.train.config_file import write_config
from dynlora.train.heap import keep_freed_memory
from dynlora.train.held_run import HeldRun
from dynlora.train.methods.starts import write_difference
from dynlora.train.signals import Stopped
from dynlora.train.trackers import tracking
from dynlora.train.trainer import row_lengths, total_steps

_REFUSED = ("iostream", "PytorchStreamWriter", "inline_container")
"""Words in torch's error messages for a full disk."""


def run_job(config: JobConfig, console: Console) -> RunReport:
    """Train, evaluate and write the run's folder.

    Args:
        config: The job.
        console: Shows progress.

    Returns:
        The values of the final table.

    Raises:
        DynamicLoraError: If model, data, configuration or output folder do not fit.
        EngineError: If there are several processes or several visible GPUs.
        KeyboardInterrupt: If the user stops the run; after training has begun, the text contains
            the command to resume.
    """
    job = _begin(config, console)
    _announce(job, console)
    past = {} if job.past is None else job.past.run
    before = past.get("metrics_before") or _evaluate_first(job)
    with job.folder.held():
        return _run(job, before)


def train_briefly(config: JobConfig) -> dict[str, int | None]:
    """Evaluate one batch of the longest rows, then train; save no model.

    Args:
        config: A job of a few steps, whose `output` is a temporary folder.

    Returns:
        The peak memory of this process, as `peak_memory` returns it.

    Raises:
        DynamicLoraError: If model, data and configuration do not fit.
    """
    job = _begin(config, Console(quiet=True))
    lengths = row_lengths(job.data.validation)
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    job.trainer.evaluate(job.data.validation.select(order[: config.training.eval_batch_size]))
    open_folder(job, {})
    _train(job)
    return peak_memory()


def _begin(config: JobConfig, console: Console) -> Job:
    """Set up the process and build the job."""
    _check_one_device()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    return build_job(config, console)


def _run(job: Job, metrics_before: dict[str, float]) -> RunReport:
    """Train, save and evaluate; all writes to the run's folder happen here."""
    record = open_folder(job, metrics_before)
    try:
        with _quiet_about_saving(job.config):
            _train(job)
            _write_model(job)
        return _finish(job, record)
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # a full disk must not hide the message
            record.update(status="interrupted", steps=job.trainer.state.global_step)
        raise Stopped(_how_to_go_on(job), getattr(stop, "signum", signal.SIGINT)) from None
    except BaseException as error:
        with suppress(OSError):
            record.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        job.progress.stop()


def _check_one_device() -> None:
    processes, gpus = os.environ.get("WORLD_SIZE", "1"), torch.cuda.device_count()
    if processes != "1":
        raise EngineError(
            f"`dynlora train` must run in one process, got WORLD_SIZE={processes[:20]!r}, and "
            "several would all write one run: unset it, or give `DynamicLoraCallback` to a Trainer "
            "of your own, which torchrun can start."
        )
    if gpus > 1:
        raise EngineError(
            f"`dynlora train` must see one GPU at most, got {gpus}, between which each batch would "
            "be split: set CUDA_VISIBLE_DEVICES to the number of one, such as 0."
        )


@contextmanager
def _quiet_about_saving(config: JobConfig) -> Iterator[None]:
    """Silence PEFT's wrong warnings when it saves."""
    with warnings.catch_warnings():
        # PEFT looks for a config.json to detect a changed vocabulary.
        warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf", UserWarning)
        # PEFT mistakes AdaLoRA layers of rank 0 for sharded ones.
        if config.method == "adalora":
            warnings.filterwarnings("ignore", "Adapter .* have invalid shape", PeftWarning)
        yield


def check_job(config: JobConfig, console: Console) -> tuple[Outlook, dict[str, float]]:
    """Build the job and evaluate it once, without writing to the run's folder.

    Args:
        config: The job.
        console: Shows notes.

    Returns:
        A summary of the planned run, and the validation metrics before training.

    Raises:
        DynamicLoraError: If model, data, configuration or output folder do not fit.
    """
    _check_one_device()
    job = build_job(config, console)
    past = {} if job.past is None else job.past.run
    return outlook(job), past.get("metrics_before") or _evaluate(job)


def outlook(job: Job) -> Outlook:
    """Return a summary of the planned run."""
    past = job.past
    return Outlook(
        task=job.config.task,
        method=job.config.method,
        train_rows=len(job.data.train),
        validation_rows=len(job.data.validation),
        num_labels=job.data.num_labels,
        start_parameters=job.prepared.start_parameters,
        budget=job.prepared.budget,
        steps=job.steps,
        resumes_from_step=None if past is None else past.step,
        output=job.folder.root,
        replaces_run=job.folder.run.exists() and _begins_folder(job),
    )


def _begins_folder(job: Job) -> bool:
    """Return whether the run starts in an empty folder, not in the folder it resumes from."""
    return job.past is None or job.past.source.root.resolve() != job.folder.root.resolve()


def _announce(job: Job, console: Console) -> None:
    """Print the skipped checkpoints and a summary of the run before training starts."""
    for reason in () if job.past is None else job.past.skipped:
        console.print(f"skipped: {reason}", highlight=False, soft_wrap=True)
    for line in outlook(job).lines():
        console.print(line, highlight=False, soft_wrap=True)


def open_folder(job: Job, metrics_before: dict[str, float]) -> RunRecord:
    """Write the first files of the run's folder, and return the record.

    A resumed run continues its metrics; a new run first clears the folder.

    Raises:
        RunFolderError: If the folder cannot be written, or contains another run.
    """
    folder, config, past = job.folder, job.config, job.past
    record = RunRecord(folder.run)
    record.values.update(
        status="running",
        task=config.task,
        method=config.method,
        seed=config.training.seed,
        resumed_from_step=None if past is None else past.step,
        versions=versions(),
        machine=machine(),
        bf16=bool(job.trainer.args.bf16),
        **identity(job.data, job.prepared),
        adapter_start_seconds=_start_seconds(job),
        texts_cut=dict(job.data.cut),
        metrics_before=metrics_before,
    )
    try:
        begins = _begins_folder(job)
        if begins and not config.overwrite:
            folder.refuse_run()  # another run may have begun since the first check
        record.update()  # first, because `run.json` marks the folder as a run's
        if begins:
            folder.clear()
        write_config(folder.config, config)
        job.metrics.start(past)
    except OSError as error:
        raise not_written(folder.root, error) from error
    return record


def _start_seconds(job: Job) -> float:
    """Return the seconds to initialize the adapter, for a resumed run from the original run."""
    now = round(job.prepared.start_seconds, 3)
    return now if job.past is None else float(job.past.run.get("adapter_start_seconds", now))


def _evaluate(job: Job) -> dict[str, float]:
    """Evaluate the current model, and return metrics without the prefix `eval_`."""
    return _plain(job, job.trainer.evaluate())


def _evaluate_first(job: Job) -> dict[str, float]:
    """Return the metrics before training; empty without `training.eval_on_start`."""
    return _evaluate(job) if job.config.training.eval_on_start else {}


def _plain(job: Job, logged: dict[str, float]) -> dict[str, float]:
    return {name: logged[f"eval_{name}"] for name in METRICS[job.config.task]}


def _train(job: Job) -> None:
    past, config = job.past, job.config.training
    if past is not None:
        job.stopwatch.seconds, job.metrics.seconds = past.train_seconds, past.eval_seconds
        ended = past.step >= total_steps(len(job.trainer.sampler), config)
        if ended or (job.stopping is not None and job.stopping.is_over(past.log)):
            job.trainer.add_callback(HeldRun(job.trainer.sampler))
    with tracking(
        job.trainer,
        config.report_to,
        job.folder.tracking,
        steps_done=0 if past is None else past.step,
        ranks=job.ranks is not None,
    ):
        set_seed(config.seed)
        with job.signals.listening(), _explaining_files(job):
            job.trainer.train(resume_from_checkpoint=None if past is None else str(past.checkpoint))
    state = job.trainer.state
    if job.signals.received is not None and state.global_step < state.max_steps:
        raise Stopped("", job.signals.received)


@contextmanager
def _explaining_files(job: Job) -> Iterator[None]:
    """Translate errors of torch and safetensors about checkpoints.

    Raises:
        ResumeError: If a file of the checkpoint to resume from cannot be read.
        RunFolderError: If a checkpoint could not be written.
    """
    try:
        yield
    except UnpicklingError as error:
        raise _unreadable(job, error) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        checkpoint = job.folder.checkpoints / f"checkpoint-{job.trainer.state.global_step}"
        half_written = checkpoint.is_dir() and not (checkpoint / PROGRESS).exists()
        of_torch = type(error) is RuntimeError
        if not half_written and isinstance(error, SafetensorError):
            raise _unreadable(job, error) from error
        if not half_written or (of_torch and not any(sign in str(error) for sign in _REFUSED)):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)  # frees disk space for `run.json`
        root, method = job.folder.root, job.config.method
        raise RunFolderError(
            f"a checkpoint must be written whole, but in {checkpoint} the disk refused "
            f"({error}): make room, then {'go on' if can_resume(root, method) else 'start again'} "
            f"with `{finish_command(root, method)}`."
        ) from error


def _unreadable(job: Job, error: Exception) -> ResumeError:
    """Return the error for a file with a correct checksum that torch or safetensors cannot read."""
    place = None if job.past is None else job.past.checkpoint
    reason = str(error).splitlines()[0]
    return ResumeError(
        f"the files of a checkpoint must be weights and plain values, got {place}, in which one "
        f"cannot be read as such ({reason}): resume from another one, or start again."
    )


def _write_model(job: Job) -> None:
    model = job.prepared.model
    if job.config.method == "full":
        model.save_pretrained(job.folder.full_model)
        job.processor.save_pretrained(job.folder.full_model)
        return
    if job.prepared.first is not None:
        write_difference(model, job.prepared.first, job.folder.adapter)
        return
    # "auto" would query the hub for a changed vocabulary; jobs never change it.
    model.save_pretrained(job.folder.adapter, save_embedding_layers=False)
    adaptive = None if job.ranks is None else job.ranks.dynamic.input_adaptive
    if adaptive is not None:
        save_input_adaptive(adaptive, job.folder.adapter)


def _how_to_go_on(job: Job) -> str:
    """Return the progress of an interrupted run, and the command to continue it."""
    folder, state, method = job.folder, job.trainer.state, job.config.method
    command = finish_command(folder.root, method)
    done = f"after {state.global_step} of {state.max_steps} steps"
    saved = complete_checkpoints(folder)
    if not saved:
        return f"{done}, before the first checkpoint; start again: {command}"
    if method == "adalora":
        return f"{done}; AdaLoRA cannot go on from a checkpoint; start again: {command}"
    return f"{done}; go on from step {max(saved)}: {command}"


def _finish(job: Job, record: RunRecord) -> RunReport:
    """Evaluate the saved model, draw the heat map, complete `run.json`, and return the report."""
    after, prepared, ranks = _metrics_after(job), job.prepared, job.ranks
    dynamic = None if ranks is None else ranks.dynamic
    places = {"adapter": job.folder.adapter}
    if job.config.method == "full":
        places = {"model": job.folder.full_model}
    if job.config.training.report_to:
        places["trackers"] = job.folder.tracking
    if ranks is not None:
        write_heatmap(
            ranks.dynamic.history,
            job.folder.heatmap,
            initial=ranks.initial,
            budget=prepared.budget,
            steps=job.trainer.state.global_step,
        )
        places |= {"rank history": job.folder.ranks, "rank heat map": job.folder.heatmap}
    report = RunReport(
        method=job.config.method,
        before=record.values["metrics_before"],
        after=after,
        budget=prepared.budget,
        parameters=prepared.live_parameters(),
        peak_parameters=prepared.peak_parameters(),
        initial_ranks={} if ranks is None else ranks.initial,
        final_ranks={} if dynamic is None else dynamic.ranks,
        events=() if dynamic is None else tuple(dynamic.history),
        train_seconds=job.stopwatch.seconds,
        dynamic_seconds=0.0 if dynamic is None else dynamic.seconds,
        places=places | {"all about the run": job.folder.run},
    )
    _complete(record, report, job)
    return report


def _metrics_after(job: Job) -> dict[str, float]:
    """Return the saved model's metrics, without a new evaluation if the last one was of it."""
    state = job.trainer.state
    evaluated = [line for line in state.log_history if "eval_loss" in line]
    newest = bool(evaluated) and evaluated[-1]["step"] == state.global_step
    if job.config.training.load_best_model_at_end:
        job.metrics.of_best = True
        job.trainer.remove_callback(job.progress)  # it would print the wrong step
        return _evaluate(job)
    return _plain(job, evaluated[-1]) if newest else _evaluate(job)


def _parameters(job: Job, report: RunReport) -> dict[str, int]:
    """Return parameter counts; an adapter saved as a difference includes its initial factors."""
    found = {
        "start": job.prepared.start_parameters,
        "peak": report.peak_parameters,
        "end": report.parameters,
    }
    return found if job.prepared.first is None else found | {"saved": 2 * report.parameters}


def _complete(record: RunRecord, report: RunReport, job: Job) -> None:
    state = job.trainer.state
    best = state.best_model_checkpoint if job.config.training.load_best_model_at_end else None
    record.update(
        status="finished",
        steps=state.global_step,
        metrics_after=report.after,
        parameters=_parameters(job, report),
        seconds={
            "training_steps": round(report.train_seconds, 3),
            "dynamic_part": round(report.dynamic_seconds, 3),
            "evaluation": round(job.metrics.seconds, 3),
        },
        **peak_memory(),
        skipped_observations={} if job.ranks is None else dict(job.ranks.dynamic.skipped),
        best_checkpoint=None if best is None else str(Path(best).absolute()),
        final_ranks=dict(report.final_ranks),
    )
