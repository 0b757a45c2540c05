"""Plan a job without its files: parameters per method, and the peak memory of two real steps.

A child, `python -m dynlora.train.plan`, reads a pickled `JobConfig` and prints a line of JSON.
"""

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from rich.console import Console

from dynlora.errors import ConfigError, DynamicLoraError
from dynlora.train.build import JobInputs, load_inputs, prepare_method
from dynlora.train.config import JobConfig, Method
from dynlora.train.job import train_briefly

STEPS = 2  # measured optimizer steps: the optimizer's state exists from the second step on
SECONDS = 3600  # time limit of a child, enforced by the system even if the parent was killed
COMMAND = (sys.executable, "-P", "-m", "dynlora.train.plan")


def plan_job(config: JobConfig, console: Console) -> dict[str, Any]:
    """Load the data once, and prepare the model for each method as in `dynlora train`.

    Returns JSON-ready values, among them parameters per possible method, the configured one first.

    Raises:
        DynamicLoraError: If model, data and configuration do not fit the configured method.
    """
    inputs = load_inputs(config)
    methods: dict[Method, dict[str, int]] = {}
    impossible: dict[Method, str] = {}
    for method in sorted(get_args(Method), key=lambda each: each != config.method):
        console.print(f"preparing method {method}", highlight=False)
        try:
            methods[method] = _parameters(inputs, replace(config, method=method))
        except DynamicLoraError as error:
            if method == config.method:
                raise
            impossible[method] = str(error)
    return {
        "task": config.task,
        "method": config.method,
        "model": inputs.source.label,
        "rows": {"train": len(inputs.data.train), "validation": len(inputs.data.validation)},
        "num_labels": inputs.data.num_labels,
        "steps": inputs.steps,
        "methods": methods,
        "impossible": impossible,
    }


def _parameters(inputs: JobInputs, config: JobConfig) -> dict[str, int]:
    prepared = prepare_method(inputs, config)
    parameters, budget = list(prepared.model.parameters()), prepared.budget
    return {
        "budget": budget,
        "end": config.dynamic.budget_left(budget) if config.method == "dynamic" else budget,
        "start": prepared.start_parameters,
        "trainable": sum(each.numel() for each in parameters if each.requires_grad),
        "total": sum(each.numel() for each in parameters),
    }


def measure_methods(
    config: JobConfig, methods: Iterable[Method], console: Console
) -> dict[str, dict[Method, Any]]:
    """Return the peak memory per `measured` method, and the reason per one `not_measured`."""
    found: dict[str, dict[Method, Any]] = {"measured": {}, "not_measured": {}}
    for method in methods:
        console.print(f"training method {method} for {STEPS} steps", highlight=False)
        try:
            found["measured"][method] = measure_peak(replace(config, method=method))
        except ConfigError as error:
            found["not_measured"][method] = str(error)
    return found


def measure_peak(config: JobConfig) -> dict[str, int | None]:
    """Return the peak memory of a child that trains for `STEPS` steps, the longest rows first."""
    bare = bare_job(config, STEPS)
    training = replace(bare.training, group_by_length=True)
    with TemporaryDirectory() as folder:
        short = replace(bare, output=str(Path(folder) / "run"), training=training)
        child = subprocess.run(COMMAND, input=pickle.dumps(short), capture_output=True, check=False)
    if child.returncode != 0:
        raise ConfigError(_reason(child.returncode, child.stderr.decode(errors="replace")))
    peak: dict[str, int | None] = json.loads(child.stdout.splitlines()[-1])
    return peak


def bare_job(config: JobConfig, steps: int) -> JobConfig:
    """Return the job for so many steps without evaluations, checkpoints and trackers."""
    training = replace(
        config.training,
        max_steps=steps,
        eval="no",
        save="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        report_to=(),
        resume="none",
    )
    searched = config.dynamic.budget_end == "auto"  # by evaluations
    dynamic = replace(config.dynamic, budget_end=None) if searched else config.dynamic
    return replace(config, training=training, dynamic=dynamic)


def _reason(code: int, log: str) -> str:
    """Return the reason for a child's end, from its exit code and standard error."""
    if code == -signal.SIGALRM:
        return f"the process was stopped after {SECONDS} seconds."
    if code == -signal.SIGKILL:
        return "the process was killed: most likely memory ran out; lower `training.batch_size`."
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"the process ended with exit code {code}."


def main() -> None:
    """Measure the job on standard input."""
    signal.alarm(SECONDS)
    config = pickle.load(sys.stdin.buffer)
    print(json.dumps(train_briefly(config)))


if __name__ == "__main__":
    main()
