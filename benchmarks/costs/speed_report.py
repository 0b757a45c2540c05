"""Write `docs/performance.md` and its figure from the recorded timings.

python -m benchmarks.costs.speed_report
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from scipy.stats import quantile_test

from benchmarks.costs.speed import ratios

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
FIGURE = PAGE.parent / "performance.svg"
NAMES = {
    "frozen": "frozen model, no adapter",
    "adalora": "PEFT AdaLoRA",
    "dora": "PEFT DoRA",
    "full": "full fine-tuning",
    "fused": "LoRA with `FusedLora`",
    "dynamic": "dynlora",
    "dynamic_unfused": "dynlora, `fused=False`",
}
"""Variants compared with PEFT LoRA, with their names in the table."""
BAR = 0.12
"""Height of a bar of the figure, in rows."""
ENGINES = {"fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
TOKEN_BYTES = 512
"""Bytes of sampled tokens per dimension of an input: 128 tokens in float32."""
Result = Mapping[str, Any]


def main() -> None:
    """Write the page and the figure."""
    timings = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    overhead, scale, blocks, processes = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("overhead", "scale", "blocks", "processes")
    )
    fine_tunes = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("fine_tune-*.json"))]
    sections = [_head(timings[0]), *_table(timings), _fine_tunes(fine_tunes)]
    sections += [_whole_run(overhead), _growth(scale), *_blocks(blocks), _processes(processes)]
    PAGE.write_text("\n".join(sections))
    _draw(timings)


def _head(result: Result) -> str:
    """Return the introduction, with the versions and the machine of the first result."""
    machine = f"{result['threads']} CPU threads" if result["device"] == "cpu" else result["device"]
    return f"""\
# Performance

In MiniLM, and in SmolLM2 with bfloat16, a training step of dynlora is faster than one of PEFT LoRA,
because its fused forward and backward save more time than moving ranks costs. In models of small
layers it is slower ([below](#how-costs-grow)). `python -m benchmarks.costs.speed_report` writes
this page from the records in `benchmarks/results`. All timings: torch {result["torch"]},
PEFT {result["peft"]}, {machine}, r = {result["rank"]}.

## Step time

![Step time relative to PEFT LoRA](performance.svg)

The table shows step time relative to PEFT LoRA: below 1 is faster. The columns are named by model,
batch size × tokens, and dtype. The variants of a column ran in one process and took steps in turn.
Each number is the median over pairs of a variant's step and one of PEFT LoRA; brackets contain its
95 % interval. Compare numbers within a column only.

Peak memory is that of a process with six steps. The last two rows are measured in separate
processes: dynlora as `dynlora train` runs it, which keeps freed memory
([your-code.md](your-code.md#speed)), against PEFT LoRA without and with this setting.

Reproduce a column with, for example:

```text
python -m benchmarks.costs.speed --model {result["model"]} --batch {result["batch"]} \\
    --tokens {result["tokens"]} --rank {result["rank"]} --dtype {result["dtype"]}
```
"""


def _table(timings: Sequence[Result]) -> list[str]:
    """Return the table: one column per timing, one row per variant."""
    rows = {name: [_ratio_text(t, key) for t in timings] for key, name in NAMES.items()}
    seconds = [f"{median(t['seconds']['lora']):.2f}" for t in timings]
    peaks = [f"{t['peak_bytes']['dynamic'] / t['peak_bytes']['lora']:.2f}" for t in timings]
    lines = [
        f"| step time / PEFT LoRA's | {' | '.join(map(_title, timings))} |",
        f"| --- |{' ---: |' * len(timings)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        f"| PEFT LoRA, seconds per step | {' | '.join(seconds)} |",
        f"| dynlora, peak memory / PEFT LoRA's | {' | '.join(peaks)} |",
        f"| dynlora, freed memory kept | {' | '.join(_alone(t, 'plain') for t in timings)} |",
        f"| dynlora and LoRA, kept in both | {' | '.join(_alone(t, 'kept') for t in timings)} |",
    ]
    return [*lines, ""]


def _alone(result: Result, lora: str) -> str:
    """Return the ratio of median steps in separate processes, freed memory kept for dynlora."""
    ours, theirs = (
        median(second for run in result["alone"][setting][name] for second in run["seconds"])
        for setting, name in (("kept", "dynamic"), (lora, "lora"))
    )
    return f"{ours / theirs:.3f}"


def _whole_run(result: Result) -> str:
    """Return the section on a whole run, events included."""
    booked = result["booked_by_the_controller"]
    return f"""\
## A whole run

`python -m benchmarks.costs.overhead --model DIR --data DIR` trains MiniLM on MRPC for
{result["steps"]} steps in {"bfloat16" if result["bf16"] else "float32"}, with every variant in turn
on the same batches:

- dynlora with its defaults: {_more(result, "over_plain", "moved")} against PEFT LoRA.
- dynlora with its defaults: {_more(result, "over_fused", "moved")} against fused LoRA alone.
- The controller accounts for {100 * booked["moved"]:.2f} % of the run. Each of the
  {result["events"]} events takes {1e3 * result["seconds_per_event"]:.0f} ms on average.
"""


def _growth(result: Result) -> str:
    """Return the section on how costs grow with layers, rank and width."""
    layers, width = (result["series"][key]["exponents"] for key in ("layers", "width"))
    calls = result["calls"]
    small, large = (_fused(calls, rows) for rows in (16, 1024))
    return f"""\
## How costs grow

`python -m benchmarks.costs.scale` times chains of linear layers on {result["tokens"]} tokens. Time
grows with a power of the number of layers or the width; exponent 1 is linear growth.

- Number of layers: exponent {layers["event"]:.2f} for an event, {layers["dynamic"]:.2f} for a step
  of dynlora and {layers["lora"]:.2f} for one of PEFT LoRA.
- Width: exponent {width["event"]:.2f} for an event and {width["floor"]:.2f} for the frozen layers.
  So dynlora's part of the time is smaller in wider models.
- Fused layers save time in large calls only. Forward and backward take {small} times as long as
  PEFT's with 16 rows, and {large} times with 1,024. Calls with fewer than 2^18 elements of input
  and output use PEFT's forward.
"""


def _fused(calls: Sequence[Result], rows: int) -> str:
    ratios = [call["ratio"] for call in calls if call["rows"] == rows]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _blocks(result: Result) -> list[str]:
    """Return the section on large models."""
    (name, whole), run = next(iter(result["whole"].items())), result["run"]
    costs = ("observe", "sample", "event")
    ratios = [result["shapes"][name]["seconds"][n] / whole["seconds"][n] for n in costs]
    names = ("an observed step", "sampling", "an event")
    checks = ", ".join(f"{r:.2f} for {n}" for n, r in zip(names, ratios, strict=True))
    rows = []
    for shape, point in result["shapes"].items():
        seconds, held = point["seconds"], point["bytes"]
        rows.append(
            f"| {shape} | {point['blocks'] * point['parameters'] / 1e9:.1f} | "
            f"{seconds['lora']:.2f} | {point['step_ratio']:.2f} | "
            f"{100 * point['dynamic_part']:.2f} % | {seconds['event'] / seconds['lora']:.3f} | "
            f"{held['dynamic'] / held['lora']:.2f} | {held['observation'] / held['lora']:.2f} |"
        )
    heads = (
        "shape", "billion parameters", "PEFT LoRA, s per step", "dynlora / PEFT LoRA",
        "controller's part", "event, in steps", "bytes / LoRA's", "of samples / LoRA's",
    )  # fmt: skip
    return [
        f"""\
## Large models

`python -m benchmarks.costs.blocks` times one and two transformer blocks with random weights in
float32, on {result["tokens"]} tokens, with r = {result["rank"]} on all linear layers. The seconds
of all blocks are on the line through both. The controller's part is that of a run of {run:,}
steps. Bytes are those of adapters, gradients and moments, and of what the controller keeps.
""",
        f"| {' | '.join(heads)} |",
        "| --- |" + " ---: |" * (len(heads) - 1),
        *rows,
        f"""
These seconds relative to those of the whole {name}: {checks}.
""",
    ]


def _fine_tunes(results: Sequence[Result]) -> str:
    """Return the section on whole fine-tunes, process starts included."""
    rows = []
    for result in results:
        sides = [result[side] for side in ("plain", "dynlora")]
        plain, ours = ([run["seconds"] for run in side] for side in sides)
        ratio = median(a / b for a, b in zip(ours, plain, strict=True))
        losses = [f"{median(run['loss'] for run in side):.4f}" for side in sides]
        rows.append(
            f"| {result['task']} | {median(plain):.0f} | {median(ours):.0f} | {ratio:.2f} | "
            f"{' | '.join(losses)} |"
        )
    return "\n".join(
        (
            "## A whole fine-tune",
            "",
            "`python -m benchmarks.costs.fine_tune` starts `dynlora train` and a script with",
            "Trainer and PEFT in turn (`benchmarks/costs/plain_trainer.py`), with equal settings.",
            "",
            "| task | script, s | dynlora, s | ratio | script's loss | dynlora's loss |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            "",
        )
    )


def _processes(result: Result) -> str:
    """Return the section on several processes."""
    layers, width, points = result["layers"], result["width"], result["points"]
    ratios = ", ".join(f"{point['step_ratio']:.2f}" for point in points)
    most = max(max(max(kind) for kind in point["bytes_ratio"].values()) for point in points)
    events = ", ".join(f"{1e3 * point['event_seconds']:.0f} ms" for point in points)
    counts = ", ".join(str(point["processes"]) for point in points)
    names = ", ".join(ENGINES[name] for name in result["sharded"])
    engines = result["sharded"].values()
    sharded = ", ".join(f"{point['step_ratio']:.2f}" for point in engines)
    sharded_events = ", ".join(f"{1e3 * point['event_seconds']:.0f} ms" for point in engines)
    sent = points[-1]["event_bytes"]
    tokens = TOKEN_BYTES * width * layers
    return f"""\
## Several processes

`python -m benchmarks.costs.processes` trains {layers} linear layers of width {width} under
DistributedDataParallel over gloo. All processes share {result["processors"]} CPUs, so seconds grow
with their number anyway. With {counts} processes:

- An event takes {events}.
- A step between events takes {ratios} times a step of plain LoRA, both taken in turn.
- With 2 processes under {names}: {sharded} times; an event takes
  {sharded_events}.
- Adapters, gradients, moments and reduced bytes are at most {most:.2f} times plain LoRA's.
- A process sends {sum(sent.values()):,.0f} bytes per event: {tokens:,} of sampled tokens, the rest
  ranks and matrices. They grow with the width of all inputs, not with the number of processes.
"""


def _more(result: Result, key: str, name: str) -> str:
    return f"{100 * result[key][name]['sum']:+.1f} %".replace("-", "−")


def _title(result: Result) -> str:
    shape = f"{result['batch']} × {result['tokens']}"
    return f"{result['model']}, {shape}, {result['dtype']}"


def _ratio_text(result: Result, name: str) -> str:
    found = ratios(result["seconds"], name)
    low, high = quantile_test(found).confidence_interval()
    return f"{median(found):.2f} [{low:.2f}, {high:.2f}]"


def _draw(timings: Sequence[Result]) -> None:
    shown = [name for name in NAMES if name != "full"]
    plt.rcParams["svg.hashsalt"] = "dynlora"
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.9 * len(timings)), layout="constrained")
    for place, name in enumerate(shown):
        values = [median(ratios(result["seconds"], name)) for result in timings]
        offset = (place - (len(shown) - 1) / 2) * (BAR + 0.01)
        heights = [row + offset for row in range(len(timings))]
        axes.barh(heights, values, height=BAR, label=NAMES[name].replace("`", ""))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(timings)), list(map(_title, timings)))
    axes.set_xlabel("step time relative to PEFT LoRA (line); shorter is faster")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(FIGURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
