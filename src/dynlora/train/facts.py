"""The facts of a run: its summary before training, its `run.json`, and its final table."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynlora.distributed import process_count
from dynlora.history import moved
from dynlora.runs.record import versions
from dynlora.schedule import Timetable
from dynlora.train.build import Job, identity
from dynlora.train.machine import machine, peak_memory
from dynlora.train.trainer import rows_per_step


def outlook(job: Job) -> dict[str, Any]:
    """Return a JSON-ready summary of the planned run."""
    past = job.past
    return {
        "task": job.config.task,
        "method": job.config.method,
        "train_rows": len(job.inputs.data.train),
        "validation_rows": len(job.inputs.data.validation),
        "num_labels": job.inputs.data.num_labels,  # None for tasks without labels
        "start_parameters": job.prepared.start_parameters,
        "other_parameters": job.prepared.other_parameters,
        "budget": job.prepared.budget,
        "steps": job.inputs.steps,
        "processes": process_count(),
        "rows_per_step": rows_per_step(job.config.training, process_count()),
        "resumes_from_step": None if past is None else past.step,
        "output": str(job.folder.root),
        "replaces_run": job.folder.run.exists() and job.begins_folder,
    }


def first_facts(job: Job) -> dict[str, Any]:
    """Return the values of `run.json` that are known before training."""
    config, past, steps = job.config, job.past, job.inputs.steps
    length = config.dynamic.total_steps or steps
    timetable = Timetable.of(replace(config.dynamic, total_steps=length))
    events = {*timetable.events, timetable.search} - {None}
    start_seconds = round(job.prepared.start_seconds, 3)
    if past is not None:  # the original run initialized the adapter
        start_seconds = float(past.run.get("adapter_start_seconds", start_seconds))
    return {
        "task": config.task,
        "method": config.method,
        "seed": config.training.seed,
        "resumed_from_step": None if past is None else past.step,
        "versions": versions(),
        "machine": machine(),
        "bf16": bool(job.trainer.args.bf16),
        **identity(job.inputs.data, job.prepared),
        "other_parameters": job.prepared.other_parameters,
        "adapter_start_seconds": start_seconds,
        "texts_cut": dict(job.inputs.data.cut),
        "planned_steps": steps,
        "planned_events": sorted(events) if job.prepared.dynamic else [],
    }


def report_of(job: Job, before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Return the JSON-ready results of a finished run.

    `before` and `after` are the validation metrics before training and of the saved model. Ranks
    are empty for methods with fixed ranks.
    """
    config, folder, dynamic = job.config, job.folder, job.recorder.dynamic
    parameters = peak = job.prepared.start_parameters
    if dynamic is not None:
        parameters, peak = dynamic.parameters, dynamic.peak_parameters
    elif job.prepared.unmasked is not None:
        parameters = job.prepared.unmasked()
    places = {"adapter": folder.adapter}
    if config.method == "full":
        places = {"model": folder.full_model}
    if config.training.report_to:
        places["trackers"] = folder.tracking
    if dynamic is not None:
        places |= {"rank history": folder.ranks, "rank heat map": folder.heatmap}
    places["all about the run"] = folder.run
    events = [] if dynamic is None else dynamic.history
    return {
        "method": config.method,
        "before": before,
        "after": after,
        "budget": job.prepared.budget,
        "parameters": parameters,
        "peak_parameters": peak,
        "other_parameters": job.prepared.other_parameters,
        "lost_by_search": None if dynamic is None else dynamic.lost_by_search,
        "initial_ranks": job.recorder.initial_ranks,
        "final_ranks": {} if dynamic is None else dynamic.ranks,
        "train_seconds": job.recorder.train_seconds,
        "dynamic_seconds": 0.0 if dynamic is None else dynamic.seconds,
        "places": {what: str(where) for what, where in places.items()},
        "events": len(events),
        "events_that_moved": sum(map(moved, events)),
    }


def last_facts(job: Job, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `run.json` that are known after training."""
    state, dynamic = job.trainer.state, job.recorder.dynamic
    best = state.best_model_checkpoint if job.config.training.load_best_model_at_end else None
    parameters = {
        "start": job.prepared.start_parameters,
        "peak": report["peak_parameters"],
        "end": report["parameters"],
    }
    if job.prepared.first is not None:  # saved as a difference, with the initial factors
        parameters["saved"] = 2 * report["parameters"]
    return {
        "steps": state.global_step,
        "metrics_after": report["after"],
        "parameters": parameters,
        "seconds": {
            "training_steps": round(report["train_seconds"], 3),
            "dynamic_part": round(report["dynamic_seconds"], 3),
            "evaluation": round(job.recorder.eval_seconds, 3),
        },
        **peak_memory(),
        "skipped_observations": {} if dynamic is None else dict(dynamic.skipped),
        "best_checkpoint": None if best is None else str(Path(best).absolute()),
        "best_step": None if best is None else int(Path(best).name.rpartition("-")[2]),
        "final_ranks": report["final_ranks"],
    }
