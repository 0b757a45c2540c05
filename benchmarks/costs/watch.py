"""Cost of `dynlora watch`: ten synthetic runs of 2,400 layers and 10,000 log entries each.

    python -m benchmarks.costs.watch

A Chromium opens the page of each run, in milliseconds up to the first paint and up to the rank map.
Then log entries and an event are appended to the last run: the time of an update is from the write
to the changed page. The share of the server is its processor time while a run logs once per second,
in parts of one core. Needs Playwright, psutil and Chromium. Run it on an otherwise idle machine.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import yaml
from playwright.sync_api import sync_playwright

from benchmarks.resumable.appended import current_commit
from dynlora.files.json_files import append_line, write_json, write_lines
from dynlora.history import Event, LayerEvent
from dynlora.report.watch import LONGEST_PAUSE
from dynlora.runs.folder import RunFolder

RUNS, BLOCKS, KINDS, ENTRIES = 10, 200, 12, 10_000
LAYERS = [f"model.layers.{n}.mlp.part{kind}" for n in range(BLOCKS) for kind in range(KINDS)]
EVENTS = (500, 1000, 1500, 2000)
UPDATES = 5
SHARE_SECONDS = 60
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
CHANGED = """(part) => { window.changed = new Promise((done) => new MutationObserver(
  () => requestAnimationFrame(() => done(performance.timeOrigin + performance.now())),
).observe(document.getElementById(part), { childList: true })); }"""


def event(step: int, before: dict[str, int]) -> Event:
    """Return an event that moves the ranks of every third layer."""
    chosen = random.Random(step)
    layers = {
        name: LayerEvent(
            rank_before=rank,
            rank_after=max(1, rank + chosen.choice((-2, 3))) if chosen.random() < 1 / 3 else rank,
            score=chosen.random(),
            share=1 / len(LAYERS),
            weight=1.0,
            variance=chosen.random(),
            effective_rank=chosen.uniform(1, 100),
            output_lost=0.0,
            waits=False,
            directions=chosen.uniform(1, 100),
        )
        for name, rank in before.items()
    }
    return Event(step=step, parameters=100_000_000, agreement=3.0, layers=layers)


def entry(step: int) -> dict[str, Any]:
    """Return a log entry."""
    values = {"step": step, "loss": 2 / (1 + step / 500), "grad_norm": 0.5, "learning_rate": 1e-4}
    return values | {"epoch": step / ENTRIES, "peak_memory_bytes": 2**30}


def ranks_after(last: Event) -> dict[str, int]:
    """Return the ranks after an event."""
    return {name: layer.rank_after for name, layer in last.layers.items()}


def write_runs(folder: Path) -> list[Path]:
    """Write the folders of unfinished runs, and return them."""
    events = [event(EVENTS[0], dict.fromkeys(LAYERS, 8))]
    for step in EVENTS[1:]:
        events.append(event(step, ranks_after(events[-1])))
    roots = [folder / f"run-{number}" for number in range(RUNS)]
    values = {"status": "running", "method": "dynamic", "planned_steps": 2 * ENTRIES}
    for root in roots:
        root.mkdir()
        write_lines(root / "ranks.jsonl", [each.to_dict() for each in events])
        write_lines(root / "metrics.jsonl", [entry(step) for step in range(1, ENTRIES + 1)])
        (root / "config.yaml").write_text(yaml.safe_dump({"training": {"eval": "epoch"}}))
        write_json(root / "run.json", values)
    return roots


def updates(page: Any, part: str, path: Path, lines: list[dict[str, Any]]) -> list[float]:
    """Append lines one by one, and return the milliseconds to each changed part of the page."""
    found = []
    for line in lines:
        time.sleep(LONGEST_PAUSE + 1)
        page.evaluate(CHANGED, part)
        began = time.time()
        append_line(path, line)
        found.append(page.evaluate("window.changed") - 1000 * began)
    return found


def share_of(server: psutil.Process, path: Path) -> float:
    """Return the processor time of the server in parts of a core, while a run logs each second."""
    time.sleep(LONGEST_PAUSE + 1)
    before, began = sum(server.cpu_times()[:2]), time.monotonic()
    for number in range(SHARE_SECONDS):
        append_line(path, entry(ENTRIES + 100 + number))
        time.sleep(1)
    return (sum(server.cpu_times()[:2]) - before) / (time.monotonic() - began)


def measure(folder: Path) -> dict[str, Any]:
    """Return the measurements."""
    with ExitStack() as held:
        roots = write_runs(folder)
        for root in roots:
            held.enter_context(RunFolder(root).held())  # else they would count as killed
        return measure_pages(roots)


def measure_pages(roots: list[Path]) -> dict[str, Any]:
    """Return the measurements of runs that go on."""
    command = [sys.executable, "-m", "dynlora", "watch", *map(str, roots), "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        with sync_playwright() as playwright:
            path = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page()
            paints, wholes = [], []
            for number in range(RUNS):
                page.goto(f"{url}?run={number}")
                page.wait_for_selector("#ranks svg")
                wholes.append(page.evaluate("performance.now()"))
                paints.append(page.evaluate(PAINT))
            root = roots[-1]
            lines = [entry(ENTRIES + 1 + n) for n in range(UPDATES)]
            logged = updates(page, "log", root / "metrics.jsonl", lines)
            last = json.loads((root / "ranks.jsonl").read_text().splitlines()[-1])
            moved = event(3000, ranks_after(Event.from_dict(last))).to_dict()
            (grown,) = updates(page, "ranks", root / "ranks.jsonl", [moved])
            server = psutil.Process(process.pid)
            share = share_of(server, root / "metrics.jsonl")
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(line.split()[1] for line in status.splitlines() if "VmHWM" in line)
        process.terminate()
    return {
        "first_paint_ms": [round(value) for value in paints],
        "rank_map_ms": [round(value) for value in wholes],
        "update_ms": [round(value) for value in logged],
        "median_update_ms": round(median(logged)),
        "event_ms": round(grown),
        "server_peak_mib": round(int(peak) / 1024, 1),
        "server_share_of_core": round(share, 5),
        "server_share_of_machine": round(share / (psutil.cpu_count() or 1), 5),
        "commit": current_commit(),
    }


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/watch.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print(json.dumps(found, indent=1))
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
