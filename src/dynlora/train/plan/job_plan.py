"""The plan of a job: configuration in; layers, parameters, events and memory per method out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from rich.console import Console

from dynlora.errors import DynamicLoraError
from dynlora.train.config import JobConfig, Method
from dynlora.train.data import load_data
from dynlora.train.plan.beside import beside_tensors, describe_batches, without_adapters
from dynlora.train.plan.layers import LayerGroup, RankRoom
from dynlora.train.plan.memory import (
    ROWS,
    Batches,
    MemoryPlan,
    Process,
    predict_memory,
)
from dynlora.train.plan.process import quick_collections
from dynlora.train.plan.rehearsal import Material, Rehearsal, rehearse
from dynlora.train.plan.script import longest_rows
from dynlora.train.pretrained import locate
from dynlora.train.tasks import TASKS
from dynlora.train.trainer import row_lengths, total_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPlan:
    """What one method would train, and what it would take."""

    budget: int
    """Parameters that the method may use for what it adds; all of the model's for `full`."""
    start: int
    """Parameters of that kind at the start."""
    trainable: int
    """Parameters that are trained: the adapter's and those of a new head."""
    total: int
    """Parameters of the model with what the method adds."""
    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPlan:
    """What a job would do."""

    config: JobConfig
    model: str
    """Folder or hub name."""
    rows: Mapping[str, int]
    """Rows by split."""
    num_labels: int | None
    steps: int
    """Optimizer steps."""
    batches: Batches
    longest: int
    """Tokens of the longest training row; 1 where rows have no tokens."""
    layers: Sequence[LayerGroup]
    """Layers that an adapter is put on; empty where no method with one is possible."""
    ranks: RankRoom | None
    """How ranks move with `method: dynamic`; None where that is not possible."""
    methods: Mapping[Method, MethodPlan]
    """Those that are possible; the configured one first."""
    impossible: Mapping[Method, str]
    """Why the others are not."""
    process: Process
    """What the process takes beside tensors."""
    device: str
    """Where memory was planned for: `cpu`, or an accelerator."""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "task": self.config.task,
            "method": self.config.method,
            "model": self.model,
            "rows": dict(self.rows),
            "num_labels": self.num_labels,
            "steps": self.steps,
            "batch_size": self.batches.training,
            "eval_batch_size": self.batches.evaluation,
            "longest_row": self.longest,
            "layers": [asdict(group) for group in self.layers],
            "ranks": None if self.ranks is None else self.ranks.to_dict(),
            "methods": {name: plan.to_dict() for name, plan in self.methods.items()},
            "impossible": dict(self.impossible),
            "process": asdict(self.process),
            "training_shapes": self.batches.training_shapes,
            "evaluation_shapes": self.batches.evaluation_shapes,
            "device": self.device,
        }


def plan_job(config: JobConfig, console: Console) -> JobPlan:
    """Load what a job names and rehearse each method on a few rows; nothing is written.

    Args:
        config: The job; its `output` is not looked at.
        console: Where progress is shown.

    Raises:
        DynamicLoraError: If model, data and configuration do not fit.
    """
    task, source = TASKS[config.task], locate(config.model)
    processor = task.load_processor(source, config.data)
    data = load_data(task, config.data, processor)
    steps = total_steps(len(data.train), config.training)
    material = Material(task=task, source=source, processor=processor, data=data, steps=steps)
    batches = describe_batches(data, config.training, steps)
    with quick_collections():
        found = _plan_methods(material, config, batches, console)
    rehearsals = [rehearsal for rehearsal, _ in found.methods.values()]
    return JobPlan(
        config=config,
        model=source.label,
        rows={"train": len(data.train), "validation": len(data.validation)},
        num_labels=data.num_labels,
        steps=steps,
        batches=batches,
        longest=max(row_lengths(data.train)),
        layers=next((r.layers for r in rehearsals if r.layers), ()),
        ranks=next((r.ranks for r in rehearsals if r.ranks is not None), None),
        methods={method: plan for method, (_, plan) in found.methods.items()},
        impossible=found.impossible,
        process=found.process,
        device=rehearsals[0].trace.device.type,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What the rehearsals of all methods showed."""

    process: Process
    methods: Mapping[Method, tuple[Rehearsal, MethodPlan]]
    impossible: Mapping[Method, str]


def _plan_methods(
    material: Material, config: JobConfig, batches: Batches, console: Console
) -> _Found:
    """Rehearse the configured method first, whose errors are the job's, and then the others."""
    console.print(f"rehearsing method {config.method}", highlight=False)
    pair = _rehearse_twice(material, config)
    # Before the remains of others are in the process.
    process = beside_tensors(pair[0], material, config, batches)
    methods = {config.method: (pair[0], _plan_method(*pair, batches, process))}
    impossible: dict[Method, str] = {}
    for method in get_args(Method):
        if method == config.method:
            continue
        console.print(f"rehearsing method {method}", highlight=False)
        try:
            pair = _rehearse_twice(material, replace(config, method=method))
            own = without_adapters(process) if method == "full" else process
            methods[method] = (pair[0], _plan_method(*pair, batches, own))
        except DynamicLoraError as error:
            impossible[method] = str(error)
    return _Found(process=process, methods=methods, impossible=impossible)


def _rehearse_twice(material: Material, config: JobConfig) -> tuple[Rehearsal, Rehearsal]:
    """Return rehearsals of the longest rows with `ROWS` rows a batch and with one more."""
    few, more = (
        longest_rows(material.data, config.training, material.steps, rows)
        for rows in (ROWS, ROWS + 1)
    )
    return rehearse(material, config, few), rehearse(material, config, more)


def _plan_method(
    rehearsal: Rehearsal, larger: Rehearsal, batches: Batches, process: Process
) -> MethodPlan:
    return MethodPlan(
        budget=rehearsal.budget,
        start=rehearsal.start,
        trainable=rehearsal.trainable,
        total=rehearsal.total,
        memory=predict_memory(rehearsal, larger, batches, process),
    )
