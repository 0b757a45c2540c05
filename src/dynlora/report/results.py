"""Results that `train` and `plan` print: before training, and of a finished run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dynlora.report.layers import short_names
from dynlora.types import Event, moved, stillness

MOVERS = 3  # maximum number of layers listed as gaining most and as losing most
UNMEASURED = "Peak memory: add --measure, which trains each method for two steps."
MEASURED = "Peak memory of a process that evaluated one batch and trained for two steps."
ON_CPU = (
    "With `training.bf16` on a CPU, torch also keeps a kernel per batch length and rank: a whole "
    "run then needs more memory."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """Data, method and output folder of a job before training."""

    task: str
    method: str
    train_rows: int
    validation_rows: int
    num_labels: int | None  # outputs of the model's head; None for tasks without labels
    start_parameters: int
    other_parameters: int  # trained outside the budget, such as a head
    budget: int  # maximum number of parameters for the method
    steps: int
    processes: int
    rows_per_step: int  # over all processes
    resumes_from_step: int | None  # steps already taken; None for a new run
    output: Path
    replaces_run: bool  # whether the run replaces an earlier one in `output`

    def lines(self) -> Iterator[str]:
        """Yield a line about the data and one about the method."""
        labels = "" if self.num_labels is None else f", {_plural(self.num_labels, 'output')}"
        yield f"data: {_rows(self.train_rows, self.validation_rows)}{labels}"
        trained = "LoRA parameters" if self.method != "full" else "parameters, all of the model's"
        if self.other_parameters:
            trained += f", {self.other_parameters:,} others"
        steps = _plural(self.steps, "step")
        if self.processes > 1:
            steps += f" of {_plural(self.rows_per_step, 'row')} on {self.processes} processes"
        yield f"method {self.method}: {self.start_parameters:,} {trained}; {steps}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {"output": str(self.output)}

    def text(self, metrics: Mapping[str, float]) -> str:
        """Return the text of `--dry-run`, with validation metrics before training."""
        past = self.resumes_from_step
        start = "" if past is None else f", going on from step {past}"
        instead = ", replacing the run there" if self.replaces_run else ""
        measured = (
            ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "in the run"
        )
        return "\n".join(
            (
                *self.lines(),
                f"validation before training: {measured or 'in the run'}",
                f"would train and write to {self.output}{start}{instead}; "
                "nothing was written (--dry-run)",
            )
        )


def plan_table(values: Mapping[str, Any]) -> Group:
    """Return parameters and measured peak memory per method as a table with notes.

    `values` come from `plan_job`; after a measurement also `measured` and `not_measured`.
    """
    measured = values.get("measured")
    peaks = {"peak_memory_bytes": "peak memory"} if measured is not None else {}
    if any(peak["peak_gpu_memory_bytes"] is not None for peak in (measured or {}).values()):
        peaks["peak_gpu_memory_bytes"] = "peak GPU memory"
    table = Table("method")
    for heading in ("adapter budget", "trained parameters", "share of the model", *peaks.values()):
        table.add_column(heading, justify="right")
    for method, plan in values["methods"].items():
        table.add_row(
            method,
            "–" if method == "full" else _budget(plan),
            f"{plan['trainable']:,}",
            f"{plan['trainable'] / plan['total']:.2%}",
            *(_mebibytes((measured or {}).get(method), key) for key in peaks),
        )
    notes = [f"{name} is not possible: {why}" for name, why in values["impossible"].items()]
    failed = values.get("not_measured", {})
    notes += [f"{name} could not be measured: {why}" for name, why in failed.items()]
    notes.append(UNMEASURED if measured is None else MEASURED)
    if measured and len(peaks) == 1:
        notes.append(ON_CPU)
    rows = _rows(values["rows"]["train"], values["rows"]["validation"])
    overview = f"{values['task']}: {rows}, {values['steps']:,} steps"
    return Group(Text(overview), table, *map(Text, notes))


def _budget(plan: Mapping[str, int]) -> str:
    """Return the adapter's budget, and what is left of it at the end if that is less."""
    end = f" → {plan['end']:,}" if plan["end"] < plan["budget"] else ""
    return f"{plan['budget']:,}{end}"


def _mebibytes(peak: Mapping[str, int] | None, key: str) -> str:
    return "–" if peak is None else f"{peak[key] / 2**20:,.0f} MiB"


def _rows(train: int, validation: int) -> str:
    return f"{train:,} training and {validation:,} validation rows"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Results of a finished run."""

    method: str
    before: Mapping[str, float]
    after: Mapping[str, float]  # validation metrics of the saved model
    budget: int  # maximum number of parameters for the method
    parameters: int
    peak_parameters: int
    other_parameters: int  # trained outside the budget, such as a head
    lost_by_search: float | None  # rise of the loss by a search's cuts over its reduction
    initial_ranks: Mapping[str, int]  # by module name; empty for methods with fixed ranks
    final_ranks: Mapping[str, int]  # by module name; empty for methods with fixed ranks
    events: Sequence[Event]  # empty for methods with fixed ranks
    train_seconds: float
    dynamic_seconds: float  # seconds of the dynamic part, included in `train_seconds`
    places: Mapping[str, Path]  # written files and folders, by label

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, with counts of events in place of the events."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        events = values.pop("events")
        values["places"] = {what: str(where) for what, where in self.places.items()}
        return values | {"events": len(events), "events_that_moved": sum(map(moved, events))}


def fact_table(title: str, *sections: Iterable[tuple[str, str]]) -> Table:
    """Return a table of labels and texts, with a line between sections."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for rows in sections:
        for label, text in rows:
            table.add_row(label, Text(text))  # plain: paths may contain rich's square brackets
        table.add_section()
    return table


def result_table(result: RunResult) -> Table:
    """Return the results as a table of two columns."""
    rows = (_metric_rows, _parameter_rows, _rank_rows, _time_rows)
    places = [(what, str(where)) for what, where in result.places.items()]
    title = f"dynlora train: method {result.method}"
    return fact_table(title, *(section(result) for section in rows), places)


def _metric_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    for name, after in result.after.items():
        text = f"{after:.4f}"
        before = result.before.get(name)
        if before is not None:  # None if the metric was not finite
            text = f"{before:.4f} → {text} ({after - before:+.4f})"
        yield f"validation {name}", text


def _parameter_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    if result.method == "full":
        yield "trained parameters", f"{result.parameters:,}"
        return
    share = result.parameters / result.budget if result.budget else 0.0
    text = f"{result.parameters:,} of the budget of {result.budget:,} ({share:.1%})"
    yield "LoRA parameters", text
    if result.peak_parameters != result.parameters:
        yield "at their peak", f"{result.peak_parameters:,}"
    if result.other_parameters:
        yield "also trained", f"{result.other_parameters:,}"
    if result.lost_by_search is not None:
        yield "needed ranks", _need(result)


def _need(result: RunResult) -> str:
    """Return the answer of `budget_end: auto` in a sentence."""
    ranks = f"ranks of {result.parameters / result.budget:.1%} of the parameters are enough"
    if max(result.final_ranks.values()) == 1:
        ranks = "rank 1 is enough in every layer"
    change = f"{result.lost_by_search:+.1%} of its reduction"
    return f"{ranks}: the cuts changed the validation loss by {change}"


def _rank_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    ranks = result.final_ranks
    if not ranks:
        return
    low, middle, high = min(ranks.values()), median(ranks.values()), max(ranks.values())
    yield "ranks", f"lowest {low}, median {middle:g}, highest {high}"
    still = stillness(result.events)
    if still is not None:
        yield "ranks did not move", still
        return
    count = sum(moved(event) for event in result.events)
    moves = {name: rank - result.initial_ranks[name] for name, rank in ranks.items()}
    up, down = sum(move > 0 for move in moves.values()), sum(move < 0 for move in moves.values())
    yield "ranks moved", f"at {count} of {len(result.events)} events: {up} layers up, {down} down"
    by_gain = sorted(moves, key=lambda name: -moves[name])
    yield "gained most", _movers([n for n in by_gain[:MOVERS] if moves[n] > 0], result)
    yield "lost most", _movers([n for n in by_gain[: -MOVERS - 1 : -1] if moves[n] < 0], result)


def _movers(names: Sequence[str], result: RunResult) -> str:
    """Return a line per layer with its short name, first and last rank."""
    short = short_names(list(result.final_ranks))
    width = max((len(short[name]) for name in names), default=0)
    lines = [
        f"{short[n]:<{width}}  {result.initial_ranks[n]} → {result.final_ranks[n]}" for n in names
    ]
    return "\n".join(lines) or "none"


def _time_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    yield "training steps", f"{result.train_seconds:.1f} s"
    if result.final_ranks:
        part = result.dynamic_seconds / result.train_seconds if result.train_seconds else 0.0
        yield "of it dynamic part", f"{result.dynamic_seconds:.2f} s ({part:.2%})"
