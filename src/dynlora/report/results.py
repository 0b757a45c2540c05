"""Results that `train` and `plan` print: before training, and of a finished run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from textwrap import fill
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dynlora.history import Event, largest_moves, moved, stillness
from dynlora.layer_names import short_names
from dynlora.report import wording

SENTENCE_WIDTH = 72  # columns; other texts, such as paths, stay whole
UNMEASURED = "Peak memory: add --measure, which trains each method for two steps."
MEASURED = "Peak memory of a process that evaluated one batch and trained for two steps."
ON_CPU = (
    "With `training.bf16` on a CPU, torch also keeps a kernel per batch length and rank: a whole "
    "run then needs more memory."
)


def outlook_lines(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line about the data and one about the method of a job; see `train.facts.outlook`."""
    outputs = values["num_labels"]
    labels = "" if outputs is None else f", {_plural(outputs, 'output')}"
    yield f"data: {_rows(values['train_rows'], values['validation_rows'])}{labels}"
    trained = "LoRA parameters" if values["method"] != "full" else "parameters, all of the model's"
    if values["other_parameters"]:
        trained += f", {values['other_parameters']:,} others"
    steps = _plural(values["steps"], "step")
    if values["processes"] > 1:
        rows = _plural(values["rows_per_step"], "row")
        steps += f" of {rows} on {values['processes']} processes"
    yield f"method {values['method']}: {values['start_parameters']:,} {trained}; {steps}"


def dry_run_text(values: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    """Return the text of `--dry-run`, with validation metrics before training."""
    past = values["resumes_from_step"]
    start = "" if past is None else f", going on from step {past}"
    instead = ", replacing the run there" if values["replaces_run"] else ""
    measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "in the run"
    end = f"would train and write to {values['output']}{start}{instead}"
    lines = [*outlook_lines(values), f"validation before training: {measured}"]
    return "\n".join([*lines, f"{end}; nothing was written (--dry-run)"])


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
        falls = f" → {plan['end']:,}" if plan["end"] < plan["budget"] else ""
        peak = (measured or {}).get(method)
        table.add_row(
            method,
            "–" if method == "full" else f"{plan['budget']:,}{falls}",
            f"{plan['trainable']:,}",
            f"{plan['trainable'] / plan['total']:.2%}",
            *("–" if peak is None else f"{peak[key] / 2**20:,.0f} MiB" for key in peaks),
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


def _rows(train: int, validation: int) -> str:
    return f"{train:,} training and {validation:,} validation rows"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


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


def result_table(result: Mapping[str, Any], events: Sequence[Event]) -> Table:
    """Return the results of a finished run as a table of two columns; see `train.facts.report_of`.

    `events` is empty for methods with fixed ranks.
    """
    return fact_table(
        f"dynlora train: method {result['method']}",
        _metric_rows(result),
        _parameter_rows(result),
        _rank_rows(result, events),
        _time_rows(result),
        result["places"].items(),
    )


def _metric_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, after in result["after"].items():
        text = f"{after:.4f}"
        before = result["before"].get(name)
        if before is not None:  # None if the metric was not finite
            text = f"{before:.4f} → {text} ({after - before:+.4f})"
        yield f"validation {name}", text
    if wording.is_chance(result["after"]):
        yield wording.CHANCE, "correlation 0 with the labels"


def _parameter_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if result["method"] == "full":
        yield "trained parameters", f"{result['parameters']:,}"
        return
    share = result["parameters"] / result["budget"] if result["budget"] else 0.0
    text = f"{result['parameters']:,} of the budget of {result['budget']:,} ({share:.1%})"
    yield "LoRA parameters", text
    if result["peak_parameters"] != result["parameters"]:
        yield "at their peak", f"{result['peak_parameters']:,}"
    if result["other_parameters"]:
        yield "also trained", f"{result['other_parameters']:,}"
    if result["lost_by_search"] is not None:
        yield "needed ranks", fill(_need(result), SENTENCE_WIDTH)


def _need(result: Mapping[str, Any]) -> str:
    """Return the answer of `budget_end: auto` in a sentence."""
    ranks = f"ranks of {result['parameters'] / result['budget']:.1%} of the parameters are enough"
    if max(result["final_ranks"].values()) == 1:
        ranks = "rank 1 is enough in every layer"
    change = f"{result['lost_by_search']:+.1%} of its reduction"
    return f"{ranks}: the cuts changed the validation loss by {change}"


def _rank_rows(result: Mapping[str, Any], events: Sequence[Event]) -> Iterator[tuple[str, str]]:
    ranks = result["final_ranks"]
    if not ranks:
        return
    low, middle, high = min(ranks.values()), median(ranks.values()), max(ranks.values())
    yield "ranks", f"lowest {low}, median {middle:g}, highest {high}"
    still = stillness(events)
    if still is not None:
        yield "ranks did not move", fill(still, SENTENCE_WIDTH)
        return
    count = sum(moved(event) for event in events)
    moves = {name: rank - result["initial_ranks"][name] for name, rank in ranks.items()}
    up, down = sum(move > 0 for move in moves.values()), sum(move < 0 for move in moves.values())
    yield "ranks moved", f"at {count} of {len(events)} events: {up} layers up, {down} down"
    gained, lost = largest_moves(result["initial_ranks"], ranks)
    yield "gained most", _movers(gained, result)
    yield "lost most", _movers(lost, result)


def _movers(names: Sequence[str], result: Mapping[str, Any]) -> str:
    """Return a line per layer with its short name, first and last rank."""
    short = short_names(list(result["final_ranks"]))
    width = max((len(short[name]) for name in names), default=0)
    lines = [
        f"{short[n]:<{width}}  {result['initial_ranks'][n]} → {result['final_ranks'][n]}"
        for n in names
    ]
    return "\n".join(lines) or "none"


def _time_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total, dynamic = result["train_seconds"], result["dynamic_seconds"]
    yield "training steps", f"{total:.1f} s"
    if result["final_ranks"]:
        part = dynamic / total if total else 0.0
        yield "of it dynamic part", f"{dynamic:.2f} s ({part:.2%})"
