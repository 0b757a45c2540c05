"""The job: configuration in; trained adapter, history and a report out.

What can be wrong with the input is found while the job is built, before the folder is touched.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import set_seed

from dynlora.report.heatmap import write_heatmap
from dynlora.report.summary import RunReport
from dynlora.train.build import Job, build_job
from dynlora.train.config import JobConfig
from dynlora.train.run_folder import RunFolder, write_config
from dynlora.train.run_record import RunRecord, machine, peak_memory_bytes, versions

METRICS = ("loss", "accuracy", "f1", "matthews")


def run_job(config: JobConfig, console: Console) -> RunReport:
    """Train, evaluate and write the run's folder.

    Args:
        config: What to do.
        console: Where progress is shown.

    Returns:
        What the table at the end shows.

    Raises:
        DynamicLoraError: If model, data, configuration or output folder do not fit.
    """
    job = build_job(config, console)
    record = open_folder(job)
    try:
        if record.values["metrics_before"] is None:
            record.update(metrics_before=_evaluate(job))
        _train(job)
        _write_model(job)
        report = _finish(job, record)
    except BaseException as error:
        record.update(status="failed", error=f"{type(error).__name__}: {error}")
        raise
    finally:
        job.progress.stop()
    return report


def open_folder(job: Job) -> RunRecord:
    """Begin the run's folder and return its record; a resumed run brings its history along."""
    folder, config = job.folder, job.config
    past: dict[str, Any] = {}
    lines, step = None, 0
    if job.checkpoint is not None:
        source = RunFolder(job.checkpoint.resolve().parent.parent)
        past = json.loads(source.run.read_text(encoding="utf-8"))
        lines, step = source.metrics, int(_trainer_state(job.checkpoint)["global_step"])
    else:
        folder.clear()
    job.metrics.start(lines, step)
    write_config(folder.config, config)
    record = RunRecord(folder.run)
    record.update(
        status="running",
        method=config.method,
        seed=config.training.seed,
        resumed_from_step=step if job.checkpoint is not None else None,
        versions=versions(),
        machine=machine(),
        bf16=bool(job.trainer.args.bf16),
        rows={"train": len(job.data.train), "validation": len(job.data.validation)},
        num_labels=job.data.num_labels,
        texts_cut=dict(job.data.cut),
        budget=job.prepared.budget,
        metrics_before=past.get("metrics_before"),
    )
    return record


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    return state


def _evaluate(job: Job) -> dict[str, float]:
    """Return the metrics of the model as it is now, under their own names."""
    return _plain(job.trainer.evaluate())


def _plain(logged: dict[str, float]) -> dict[str, float]:
    return {name: logged[f"eval_{name}"] for name in METRICS if f"eval_{name}" in logged}


def _train(job: Job) -> None:
    set_seed(job.config.training.seed)
    job.trainer.train(
        resume_from_checkpoint=None if job.checkpoint is None else str(job.checkpoint)
    )


def _write_model(job: Job) -> None:
    model = job.prepared.model
    if job.config.method == "full":
        model.save_pretrained(job.folder.full_model)
        job.tokenizer.save_pretrained(job.folder.full_model)
        return
    # "auto" would ask the hub whether the base model's vocabulary was changed; it never is here.
    model.save_pretrained(job.folder.adapter, save_embedding_layers=False)


def _finish(job: Job, record: RunRecord) -> RunReport:
    """Evaluate what was saved, draw the heat map, complete `run.json`, and report."""
    after, prepared, ranks = _metrics_after(job), job.prepared, job.ranks
    steps = job.trainer.state.global_step
    places = {"adapter": job.folder.adapter}
    if job.config.method == "full":
        places = {"model": job.folder.full_model}
    if ranks is not None:
        history, initial = ranks.dynamic.history, ranks.initial
        write_heatmap(
            history, job.folder.heatmap, initial=initial, budget=ranks.dynamic.budget, steps=steps
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
        final_ranks={} if ranks is None else ranks.dynamic.ranks,
        events=0 if ranks is None else len(ranks.dynamic.history),
        train_seconds=job.stopwatch.seconds,
        dynamic_seconds=0.0 if ranks is None else ranks.seconds,
        places=places,
    )
    _complete(record, report, job)
    return report


def _metrics_after(job: Job) -> dict[str, float]:
    """Return the metrics of the model that is saved, from the last evaluation if it was of it."""
    state = job.trainer.state
    evaluated = [line for line in state.log_history if "eval_loss" in line]
    newest = bool(evaluated) and evaluated[-1]["step"] == state.global_step
    if newest and not job.config.training.load_best_model_at_end:
        return _plain(evaluated[-1])
    return _evaluate(job)


def _complete(record: RunRecord, report: RunReport, job: Job) -> None:
    skipped = {} if job.ranks is None else dict(job.ranks.dynamic.skipped)
    record.update(
        status="finished",
        steps=job.trainer.state.global_step,
        metrics_after=report.after,
        parameters={
            "start": job.prepared.start_parameters,
            "peak": report.peak_parameters,
            "end": report.parameters,
        },
        seconds={
            "training_steps": round(report.train_seconds, 3),
            "dynamic_part": round(report.dynamic_seconds, 3),
            "evaluation": round(job.metrics.eval_seconds, 3),
        },
        peak_memory_bytes=peak_memory_bytes(),
        skipped_observations=skipped,
        best_checkpoint=job.trainer.state.best_model_checkpoint,
        final_ranks=dict(report.final_ranks),
    )
