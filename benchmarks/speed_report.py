"""Make `docs/performance.md` and its figure of the files that `benchmarks.speed` wrote.

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
FIGURE = PAGE.parent / "performance.svg"
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
with PEFT's before anything was timed. Peak memory is that of a process that takes four steps, the
model's loading included. This page is made by `python -m benchmarks.speed_report` of the files
`benchmarks/results/speed-*.json`, and those by the commands above the tables.
"""


def main() -> None:
    """Write the page and the figure."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("speed-*.json"))]
    parts = [HEAD, f"![Step time over PEFT LoRA's]({FIGURE.name})\n"]
    PAGE.write_text("\n".join([*parts, *map(_section, found)]))
    _draw(found)


def _section(result: Mapping[str, Any]) -> str:
    batch, tokens, rank = result["batch"], result["tokens"], result["rank"]
    command = (
        f"python -m benchmarks.speed --model {result['model']} --batch {batch} --tokens {tokens} "
        f"--rank {rank} --dtype {result['dtype']}"
    )
    lines = [
        f"## {_title(result)}\n",
        f"`{command}`: torch {result['torch']}, PEFT {result['peft']}, {result['threads']} CPU "
        f"threads, {len(result['seconds']['lora'])} steps.\n",
        "| step | seconds | over PEFT LoRA | over the floor | tokens a second | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in NAMES.items():
        seconds = result["seconds"][name]
        lines.append(
            f"| {label} | {median(seconds):.3f} | {_ratio(result, name, 'lora')} | "
            f"{_ratio(result, name, 'frozen')} | {batch * tokens / median(seconds):,.0f} | "
            f"{result['peak_bytes'][name] / 2**20:,.0f} MiB |"
        )
    share = f"{100 * result['dynamic_part']:.1f} %"
    lines.append(
        "\nFused outputs and gradients differ from PEFT's by at most "
        f"{result['difference']:.0e} of the largest. An event takes "
        f"{result['seconds_per_event']:.3f} s, at the median of {result['events']}; what the "
        f"controller books as its own is {share} of these few steps, events included.\n"
    )
    return "\n".join(lines)


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


if __name__ == "__main__":
    main()
