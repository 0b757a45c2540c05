"""The plan of a job as tables: what is trained, on which layers, and the memory of each method."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

MEBIBYTE = 2**20
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "allocator",
    "process",
    "loading",
    "peak",
)
HOW = (
    "How memory is predicted: each method was trained for two steps with batches of 2 and of 3 of "
    "the longest rows, every tensor's memory noted and extended along a straight line to the rows "
    "of the real batch."
)
ON_CPU = (
    "The result was replayed through this machine's allocator, and what Python, libraries and data "
    "take, and how much loading the model takes, was read from this process. The parts are not all "
    "there at once: their sum is more than the peak."
)
ROUGHLY = (
    "With this model operations depend on the rows of a batch: only the peaks of two rehearsals "
    "were extended, and what the allocator holds beyond the tensors is not in it."
)
ON_ACCELERATOR = (
    "What torch's allocator keeps beyond the tensors, and the memory of the host, are not in it."
)


def plan_tables(values: Mapping[str, Any]) -> Group:
    """Return a plan, ready to print.

    Args:
        values: As `JobPlan.to_dict` gives them, with `measured` where that was done.
    """
    parts: list[Any] = [_overview(values)]
    if values["layers"]:
        parts.append(_layers(values))
    parts.append(_methods(values))
    parts += [
        Text(f"{method} is not possible: {why}") for method, why in values["impossible"].items()
    ]
    notes = [HOW, ON_CPU if values["device"] == "cpu" else ON_ACCELERATOR]
    if any(plan["memory"]["roughly"] for plan in values["methods"].values()):
        notes.append(ROUGHLY)
    if values["process"]["rank_kernels"] >= MEBIBYTE / 10:
        size = values["process"]["rank_kernels"] / MEBIBYTE
        notes.append(
            "Where ranks move, torch makes more kernels on this CPU, which are not in it: "
            f"{size:.1f} MiB for each rank that is new to layers of one shape, times the shapes of "
            f"a batch that come then, {values['training_shapes']} in all; "
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY in the environment bounds how many are kept."
        )
    return Group(*parts, Text(" ".join(notes)))


def _overview(values: Mapping[str, Any]) -> Table:
    table = Table(title=f"dynlora plan: {values['task']}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows, batch = values["rows"], values["batch_size"]
    tokens = (
        f", the longest of {values['longest_row']:,} tokens" if values["longest_row"] > 1 else ""
    )
    table.add_row("model", Text(values["model"]))
    table.add_row("rows", f"{rows['train']:,} to train on{tokens}; {rows['validation']:,} to test")
    if values["num_labels"] is not None:
        table.add_row("outputs", str(values["num_labels"]))
    table.add_row("steps", f"{values['steps']:,} of {batch:,} rows a batch")
    table.add_row("method", values["method"])
    if (ranks := values["ranks"]) is not None:
        pinned = f"; {ranks['pinned']} layers cannot move" if ranks["pinned"] else ""
        table.add_row("ranks", f"from {ranks['lowest']} to {ranks['highest']}{pinned}")
        table.add_row("events", f"after steps {', '.join(f'{step:,}' for step in ranks['events'])}")
    if (measured := values.get("measured")) is not None:
        table.add_section()
        for label, text in _measured(measured, values["steps"]):
            table.add_row(label, text)
    return table


def _measured(measured: Mapping[str, Any], steps: int) -> list[tuple[str, str]]:
    peak = _mebibytes(measured["peak_memory_bytes"])
    gpu = measured["peak_gpu_memory_bytes"]
    on_gpu = "" if gpu is None else f", {_mebibytes(gpu)} MiB on the GPU"
    seconds = measured["seconds_a_step"]
    return [
        ("measured peak", f"{peak} MiB{on_gpu}, in {measured['steps']} steps"),
        ("measured time", f"{seconds:.2f} s a step: {seconds * steps:,.0f} s for all, at most, "
                          "if the longest rows come first"),
    ]  # fmt: skip


def _layers(values: Mapping[str, Any]) -> Table:
    table = Table(title="layers with an adapter")
    for heading in ("name", "type"):
        table.add_column(heading)
    for heading in ("layers", "in", "out", "parameters each"):
        table.add_column(heading, justify="right")
    for group in values["layers"]:
        counts = (group[key] for key in ("count", "in_features", "out_features", "parameters"))
        table.add_row(
            Text(group["ending"]), Text(group["kind"]), *(f"{count:,}" for count in counts)
        )
    return table


def _methods(values: Mapping[str, Any]) -> Table:
    table = Table(title="what each method trains, and its memory in MiB")
    for heading in ("method", "budget", "trained", "share", *PARTS):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, plan in values["methods"].items():
        share = plan["trainable"] / plan["total"]
        memory = (_mebibytes(plan["memory"][part]) for part in PARTS)
        table.add_row(
            method, f"{plan['budget']:,}", f"{plan['trainable']:,}", f"{share:.2%}", *memory
        )
    return table


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:,.0f}"
