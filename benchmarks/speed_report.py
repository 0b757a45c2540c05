"""Make `docs/performance.md` and its figures of the files of the timings.

python -m benchmarks.speed_report
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
FIGURE, GROWTH = PAGE.parent / "performance.svg", PAGE.parent / "scale.svg"
NAMES = {
    "frozen": "frozen model, the floor",
    "lora": "PEFT LoRA",
    "adalora": "PEFT AdaLoRA",
    "dora": "PEFT DoRA",
    "full": "full fine-tuning",
    "fused": "LoRA with `FusedLora`",
    "dynamic": "dynlora: dynamic ranks, fused",
    "dynamic_unfused": "dynamic ranks, `fused=False`",
}
HEAD = """# Performance

What a training step takes, beside PEFT's own. All variants of a table were timed in one run, a step
each in turn, so that only ratios within a table mean anything; the ratio is the median over the
steps' pairs, with the quartiles in brackets. Outputs and gradients of the fused model were compared
with PEFT's before anything was timed. Peak memory is that of a process that takes six steps, the
model's loading included. This page is made by `python -m benchmarks.speed_report` of the files
`speed-*.json`, `overhead.json`, `scale.json` and `processes.json` in `benchmarks/results`, and
those by the commands above the tables.

All fused rows were timed when one call computed all layers that read one tensor. Each layer now
computes its own output, which adds about 3 % to a step of MiniLM in float32 and 5 % in bfloat16
([log.md](log.md)).
"""
VARIANTS = {
    "plain": "PEFT LoRA",
    "fused": "with `FusedLora`, no controller",
    "observed": "dynlora, observing and planning, every rank kept",
    "moved": "dynlora, default: ranks move",
    "given": "the same ranks, given to it; nothing observed",
}
COSTS = {
    "floor": "frozen layers, forward and backward",
    "lora": "a step of PEFT LoRA",
    "dynamic": "a step of dynlora",
    "observe": "observing gradients, in a step that has it",
    "sample": "sampling inputs, in a step that has it",
    "event": "an event",
}


def main() -> None:
    """Write the page and the figure."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    parts = [HEAD, f"![Step time over PEFT LoRA's]({FIGURE.name})\n"]
    overhead = json.loads((RESULTS / "overhead.json").read_text())
    scale = json.loads((RESULTS / "scale.json").read_text())
    processes = json.loads((RESULTS / "processes.json").read_text())
    parts += [*map(_section, found), _overhead(overhead), _scale(scale), _processes(processes)]
    PAGE.write_text("\n".join(parts))
    _draw(found)
    _draw_growth(scale)


def _section(result: Mapping[str, Any]) -> str:
    batch, tokens, rank = result["batch"], result["tokens"], result["rank"]
    command = (
        f"python -m benchmarks.speed --model {result['model']} --batch {batch} --tokens {tokens} "
        f"--rank {rank} --dtype {result['dtype']}"
    ) + ("" if result["device"] == "cpu" else " --device cuda")
    lines = [
        f"## {_title(result)}\n",
        f"`{command}`: torch {result['torch']}, PEFT {result['peft']}, {_machine(result)}, "
        f"{len(result['seconds']['lora'])} steps.\n",
        "| step | seconds | over PEFT LoRA | over the floor | tokens a second | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, seconds in result["seconds"].items():
        lines.append(
            f"| {NAMES[name]} | {median(seconds):.3f} | {_ratio(result, name, 'lora')} | "
            f"{_ratio(result, name, 'frozen')} | {batch * tokens / median(seconds):,.0f} | "
            f"{result['peak_bytes'][name] / 2**20:,.0f} MiB |"
        )
    share = f"{100 * result['dynamic_part']:.1f} %"
    lines.append(
        "\nBefore the timing, outputs and gradients were compared with PEFT's in float32: the "
        f"largest relative error of a tensor is {result['errors']['fused']:.0e} fused and "
        f"{result['errors']['lora']:.0e} from PEFT itself in {result['dtype']}. An event takes "
        f"{result['seconds_per_event']:.3f} s, at the median of {result['events']}; what the "
        f"controller books as its own is {share} of these few steps, events included.\n"
    )
    lines += _alone(result["alone"])
    return "\n".join(lines)


def _alone(result: Mapping[str, Any]) -> list[str]:
    """Return the table of variants in processes of their own, without and with memory kept."""
    runs = {
        (name, setting): found
        for setting, variants in result.items()
        for name, found in variants.items()
    }
    seconds = {
        key: median(s for run in found for s in run["seconds"]) for key, found in runs.items()
    }
    peaks = {key: median(run["peak"] for run in found) for key, found in runs.items()}

    def over(key: tuple[str, str], other: tuple[str, str]) -> str:
        return f"{seconds[key] / seconds[other]:.3f}" if other in seconds else "–"

    lines = [
        "In processes of their own, as users run them, which took turns; memory is kept by the "
        "setting of `dynlora train` (`train/heap.py`), and peaks are over the plain PEFT LoRA's.\n",
        "| step | seconds | over PEFT LoRA | over that, memory kept | over PEFT AdaLoRA | peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key in sorted(seconds, key=lambda key: (list(NAMES).index(key[0]), key[1] == "kept")):
        name, setting = key
        lines.append(
            f"| {NAMES[name]}{', memory kept' if setting == 'kept' else ''} | {seconds[key]:.3f} | "
            f"{over(key, ('lora', 'plain'))} | {over(key, ('lora', 'kept'))} | "
            f"{over(key, ('adalora', 'plain'))} | {peaks[key] / peaks['lora', 'plain']:.3f} |"
        )
    return [*lines, ""]


def _machine(result: Mapping[str, Any]) -> str:
    on_cpu = result["device"] == "cpu"
    return f"{result['threads']} CPU threads" if on_cpu else str(result["device"])


def _overhead(result: Mapping[str, Any]) -> str:
    """Return the section on a whole run."""
    booked = result["booked_by_the_controller"]
    lines = [
        "## What the dynamic part costs in a whole run\n",
        "`python -m benchmarks.overhead --model DIR --data DIR`: MiniLM on MRPC, three epochs of "
        f"batches of 32, {result['steps']} steps, {'bfloat16' if result['bf16'] else 'float32'}, "
        f"{result['threads']} CPU threads, events included. Models take every batch in turn.\n",
        "| run | all steps, seconds | over PEFT LoRA | over fused LoRA | booked |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, label in VARIANTS.items():
        share = f"{100 * booked[name]:.2f} %" if name in booked else "–"
        lines.append(
            f"| {label} | {result['seconds'][name]:.1f} | {_more(result, 'over_plain', name)} | "
            f"{_more(result, 'over_fused', name)} | {share} |"
        )
    lines.append(
        f"\nAn event takes {result['seconds_per_event']:.3f} s, at the mean of {result['events']}. "
        "Over fused LoRA, in the sum of all steps and in the median of their pairs, observing with "
        f"every rank kept takes {_both(result['over_fused']['observed'])}, and the default, which "
        f"ended with {result['distinct_ranks']} different ranks, "
        f"{_both(result['over_fused']['moved'])}. In bfloat16 torch makes a kernel for each new "
        "pair of a rank and a batch's length, and the default is four times of five the first to "
        "need it. The model that is given the same ranks takes "
        f"{_both(result['over_fused']['given'])}.\n"
    )
    return "\n".join(lines)


def _both(more: Mapping[str, float]) -> str:
    total, middle = (100 * more[key] for key in ("sum", "median_of_pairs"))
    return f"{total:+.2f} and {middle:+.2f} %"


def _more(result: Mapping[str, Any], key: str, name: str) -> str:
    return f"{100 * result[key][name]['sum']:+.1f} %"


def _scale(result: Mapping[str, Any]) -> str:
    """Return the section on how costs grow."""
    lines = [
        "## How costs grow\n",
        f"`python -m benchmarks.scale`: chains of square linear layers, {result['tokens']} tokens, "
        f"float32, {result['threads']} CPU threads. Median milliseconds, and the exponent of the "
        "power of what grows that fits them best: 1 is linear.\n",
        f"![Costs against what grows]({GROWTH.name})\n",
    ]
    for grows, series in result["series"].items():
        points = series["points"]
        kept = [key for key in ("layers", "width", "rank") if key != grows]
        fixed = ", ".join(f"{key} {points[0][key]}" for key in kept)
        lines += [
            f"| {grows} ({fixed}) | {' | '.join(str(p[grows]) for p in points)} | exponent |",
            f"| --- |{' --- |' * (len(points) + 1)}",
        ]
        for name, label in COSTS.items():
            cells = " | ".join(_milliseconds(point[name]) for point in points)
            lines.append(f"| {label} | {cells} | {series['exponents'][name]:.2f} |")
        lines.append("")
    lines += [
        "Fused forwards against PEFT's, forward and backward of a chain of six layers: the median "
        "ratio of paired calls. Above 1 PEFT is faster; calls with fewer than 2^18 elements of "
        "input and output together are left to it.\n",
        "| width, rank | " + " | ".join(f"{rows} rows" for rows in _rows(result)) + " |",
        f"| --- |{' --- |' * len(_rows(result))}",
    ]
    for width, rank in dict.fromkeys((c["width"], c["rank"]) for c in result["calls"]):
        ratios = [c["ratio"] for c in result["calls"] if (c["width"], c["rank"]) == (width, rank)]
        lines.append(f"| {width}, {rank} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return "\n".join([*lines, ""])


def _processes(result: Mapping[str, Any]) -> str:
    layers, width = result["layers"], result["width"]
    lines = [
        "## Several processes\n",
        f"`python -m benchmarks.processes`: a chain of {layers} square linear layers of width "
        f"{width}, r = {result['rank']}, under DistributedDataParallel over gloo; all processes "
        f"share {result['processors']} CPUs, so that seconds grow with their number anyway.\n",
        "| processes | a step of plain LoRA, ms | a step between events, ms | an event, ms | bytes "
        "that a process gives to an event |",
        "| --- | --- | --- | --- | --- |",
    ]
    for point in result["points"]:
        plain, dynamic = (_milliseconds(point["step_seconds"][k]) for k in ("plain", "dynamic"))
        lines.append(
            f"| {point['processes']} | {plain} | {dynamic} | "
            f"{_milliseconds(point['event_seconds'])} | {point['event_bytes']:,.0f} |"
        )
    tokens = 128 * 4 * width * layers
    large = 10_000 * 128 * 4 * 4096 / 1e9
    lines.append(
        f"\nOf these bytes {tokens:,} are sampled tokens, which are added up. They grow with the "
        "layers' inputs and not with the number of processes: 10,000 layers of width 4,096, each "
        f"with an input of its own, would give {large:.0f} GB to an event, five times in a run. "
        "Keys are what a process gets from every other: 1,024 bytes for all layers of the same "
        "tokens: a megabyte from 1,000 processes. Where each layer sees tokens of its own they are "
        "1,024 bytes a layer, and 10,000 layers on 1,000 processes would have to hold 10 GB. Steps "
        "between events take longer than plain LoRA's because calls this small are left to PEFT's "
        "forward, which in static mode computes at the rank that tensors are held at, here 64.\n"
    )
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _rows(result: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(call["rows"] for call in result["calls"]))


def _title(result: Mapping[str, Any]) -> str:
    shape = f"{result['batch']} × {result['tokens']} tokens"
    return f"{result['model']}, {shape}, r = {result['rank']}, {result['dtype']}"


def _ratios(result: Mapping[str, Any], name: str, other: str) -> list[float]:
    pairs = zip(result["seconds"][name], result["seconds"][other], strict=True)
    return [a / b for a, b in pairs]


def _ratio(result: Mapping[str, Any], name: str, other: str) -> str:
    if name == other:
        return "1"
    ratios = _ratios(result, name, other)
    low, middle, high = quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.2f}, {high:.2f}]"


def _draw(found: Sequence[Mapping[str, Any]]) -> None:
    shown = [name for name in NAMES if name not in ("full", "lora")]
    plt.rcParams["svg.hashsalt"] = "dynlora"
    figure, axes = plt.subplots(figsize=(10, 0.8 + 0.9 * len(found)), layout="constrained")
    for place, name in enumerate(shown):
        values = [median(_ratios(result, name, "lora")) for result in found]
        heights = [row + 0.13 * (place - 2.5) for row in range(len(found))]
        axes.barh(heights, values, height=0.12, label=NAMES[name].replace("`", ""))
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [_title(result) for result in found])
    axes.set_xlabel("step time over PEFT LoRA's (line); shorter is faster")
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(FIGURE, metadata={"Date": None})


def _draw_growth(result: Mapping[str, Any]) -> None:
    figure, panels = plt.subplots(1, len(result["series"]), figsize=(12, 4), layout="constrained")
    for axes, (grows, series) in zip(panels, result["series"].items(), strict=True):
        points = series["points"]
        for name, label in COSTS.items():
            values = [1e3 * point[name] for point in points]
            axes.loglog([point[grows] for point in points], values, marker="o", label=label)
        axes.set_xticks([point[grows] for point in points], [str(p[grows]) for p in points])
        axes.minorticks_off()
        axes.set_xlabel(grows)
        axes.set_ylabel("milliseconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(GROWTH, metadata={"Date": None})


if __name__ == "__main__":
    main()
