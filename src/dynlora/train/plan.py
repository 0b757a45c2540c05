"""Compute the parameters per method from a configuration, without training or writing files."""

from dataclasses import replace
from typing import Any, get_args

from rich.console import Console

from dynlora.errors import DynamicLoraError
from dynlora.train.build import JobInputs, load_inputs, prepare_method
from dynlora.train.config import JobConfig, Method


def plan_job(config: JobConfig, console: Console) -> dict[str, Any]:
    """Load the data once, and prepare the model for each method as in `dynlora train`.

    Args:
        config: The job; `output` is not read.
        console: Shows progress.

    Returns:
        JSON-ready values. `methods`: parameters per possible method, the configured method first.
        `impossible`: the reason per other method.

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
    parameters = list(prepared.model.parameters())
    return {
        "budget": prepared.budget,
        "start": prepared.start_parameters,
        "trainable": sum(each.numel() for each in parameters if each.requires_grad),
        "total": sum(each.numel() for each in parameters),
    }
