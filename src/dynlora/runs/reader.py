"""Read a run's folder as far as its files go, or check that it is finished."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dynlora.adapter_files.formats import WEIGHTS, group_keys
from dynlora.adapter_files.names import check_names, natural_key
from dynlora.errors import RunFileError
from dynlora.history import Event
from dynlora.runs.checkpoints import finish_command
from dynlora.runs.folder import RunFolder
from dynlora.runs.lines import Lines, event_lines, metric_lines
from dynlora.runs.record import UNFINISHED, read_config, read_record, wrong_record

FACTORS = {".lora_A.weight": "A", ".lora_embedding_A": "A", ".lora_A": "A"}
"""Ends of the names under which PEFT saves `lora_A`, whose first axis is the rank."""
MEMORY = ("peak_memory_bytes", "peak_gpu_memory_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The contents of a run's folder."""

    root: Path
    status: str  # `finished`, or a key of `UNFINISHED`
    method: str  # `dynamic`, `lora`, `adalora` or `full`
    seed: int | None
    written: str  # last write of `run.json` in ISO 8601, or `unknown`
    steps: int  # optimizer steps taken; without a number in `run.json` the last one in other files
    budget: int | None  # maximum number of parameters for the method
    before: Mapping[str, float | None]  # validation metrics before training
    after: Mapping[str, float | None]  # of the saved model; empty in an unfinished run
    parameters: Mapping[str, float | None]  # in use at the `start`, at the `peak` and at the `end`
    seconds: Mapping[str, float | None]
    memory: Mapping[str, int | None]
    rows: Mapping[str, float | None]
    facts: Mapping[str, Any]  # full content of `run.json`
    config: Mapping[str, Any]  # the resolved configuration, nested
    metrics: Sequence[Mapping[str, Any]]
    events: Sequence[Event]  # up to the step of the saved weights
    initial_ranks: Mapping[str, int]  # by module name; empty for methods with fixed ranks
    final_ranks: Mapping[str, int]  # latest known rank by module name; empty without LoRA layers
    notes: Sequence[str]  # sentences about missing parts and their reasons


def read_run(
    root: Path, lines: Lines[dict[str, Any]] | None = None, history: Lines[Event] | None = None
) -> RunFiles:
    """Read a run's folder; `lines` and `history` of an earlier call get only what is new.

    Raises `RunFileError` if the folder is not a run's or a file is invalid, and `AdapterError` if a
    name in its adapter is too long.
    """
    folder = RunFolder(root)
    facts = run_facts(folder)
    lines, history = lines or metric_lines(folder.metrics), history or event_lines(folder.ranks)
    metrics, every = lines.read().found, history.read().found
    best, steps = facts.get("best_step"), facts.get("steps")
    events = [event for event in every if best is None or event.step <= best]
    initial, final = _ranks(folder, facts, events)
    if steps is None:
        reached = [line["step"] for line in metrics] + [event.step for event in every]
        steps = max(reached, default=0)
    return RunFiles(
        root=root,
        status=facts["status"],
        method=facts.get("method", "unknown"),
        seed=facts.get("seed"),
        written=str(facts.get("written", "unknown")),
        steps=steps,
        budget=facts.get("budget"),
        before=facts.get("metrics_before", {}),
        after=facts.get("metrics_after", {}),
        parameters=facts.get("parameters", {}),
        seconds=facts.get("seconds", {}),
        memory={key: facts.get(key) for key in MEMORY},
        rows=facts.get("rows", {}),
        facts=facts,
        config=read_config(folder.config),
        metrics=metrics,
        events=events,
        initial_ranks=initial,
        final_ranks=final,
        notes=list(_notes(facts, steps, lines, history, left_out=len(every) - len(events))),
    )


def run_facts(folder: RunFolder) -> dict[str, Any]:
    """Return the values of `run.json`; raise `RunFileError` if the folder is not a run's."""
    root = folder.root
    if not folder.run.exists():
        found = "a folder without one" if root.is_dir() else "no folder"
        outer = RunFolder(root.parent).run.is_file()
        advice = f"give {root.parent}" if outer else "give the `output` of a `dynlora train`"
        raise RunFileError(
            f"a run must be a folder with a run.json, got {root}, which is {found}: {advice}."
        )
    return read_record(folder.run)


def check_finished(folder: RunFolder) -> dict[str, Any]:
    """Return the values of `run.json`; raise `RunFileError` unless the run is complete."""
    facts = run_facts(folder)
    refuse_unfinished(folder, facts)
    needed = [folder.adapter / "adapter_config.json", folder.adapter / WEIGHTS]
    if facts.get("method") == "full":
        needed = [folder.full_model / "config.json"]
    for path in (folder.config, *needed):
        if not path.is_file():  # loading might query the hub
            raise RunFileError(
                f"a finished run must hold {path.relative_to(folder.root)}, which is missing in "
                f"{folder.root}: restore it from a copy, or train again."
            )
    return facts


def refuse_unfinished(folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Raise `RunFileError` unless a run is finished; `facts` are the values of its `run.json`."""
    if facts["status"] != "finished":
        method, launched = facts.get("method", "unknown"), facts.get("processes", 1)
        command = finish_command(folder.root, method, launched, facts.get("engine"))
        raise RunFileError(
            f"RUN must be finished, got {folder.root}, which {UNFINISHED[facts['status']]}: finish "
            f"it with `{command}`."
        )


def _ranks(
    folder: RunFolder, facts: Mapping[str, Any], events: Sequence[Event]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return initial and latest ranks, from the events, `run.json` or the adapter."""
    ranks: dict[str, int] = facts.get("final_ranks", {})
    if not events:
        return ranks, ranks or _adapter_ranks(folder.adapter)
    last = {name: layer.rank_after for name, layer in events[-1].layers.items()}
    if ranks and ranks.keys() != last.keys():
        raise wrong_record(folder.run, "`final_ranks` must be of the layers in ranks.jsonl")
    return {name: layer.rank_before for name, layer in events[0].layers.items()}, ranks or last


def _adapter_ranks(folder: Path) -> dict[str, int]:
    """Return the rank per module in natural order, from the file's header; empty without a file."""
    path = folder / WEIGHTS
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            keys = file.keys()
            check_names(keys, path)
            layers = group_keys(keys, FACTORS)[0]
            names = sorted(layers, key=natural_key)
            return {name: file.get_slice(layers[name]["A"]).get_shape()[0] for name in names}
    except (OSError, SafetensorError) as error:
        raise RunFileError(
            f"an adapter's {WEIGHTS} must be a whole safetensors file, got {error} for {path} of "
            f"{path.stat().st_size} bytes: restore the file from a copy, or train again."
        ) from error


def _notes(
    facts: Mapping[str, Any], steps: int, lines: Lines[Any], history: Lines[Event], left_out: int
) -> Iterator[str]:
    if facts["status"] in UNFINISHED:
        why = f": {facts['error']}" if "error" in facts else ""
        yield f"This run {UNFINISHED[facts['status']]} after {steps} steps{why}."
    for file in (lines, history):
        if file.cut:
            yield f"The last line of {file.path.name} was cut short and is left out."
    if not lines.found:
        yield "metrics.jsonl holds no line, so there is no curve to draw."
    if left_out:
        later = "1 later event is" if left_out == 1 else f"{left_out} later events are"
        best = facts["best_step"]
        yield f"The adapter is that of step {best}, the best checkpoint: {later} left out."
