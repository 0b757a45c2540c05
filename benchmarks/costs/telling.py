"""Cost of telling how a run goes: the bar and lines of `dynlora train`, and ranks in TensorBoard.

    python -m benchmarks.costs.telling examples/quickstart.yaml --training.epochs=10

Trains in this process as on a terminal, with timers around everything that prints or tracks, the
bar's own thread included, and writes each part's processor time as a share of the training time.
Run it on an otherwise idle machine, for at least ten minutes. `benchmarks.costs.watch` measures the
watch page.
"""

import json
import logging
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.live import Live

from benchmarks.resumable.appended import current_commit
from dynlora.cli.main import main as run_dynlora
from dynlora.integrations.trackers import RankTracker
from dynlora.train.callbacks import ProgressBar

RESULT = Path("benchmarks/results/telling.json")
TOLD = {
    "bar": (ProgressBar, ("on_step_end", "on_log")),
    "redrawing the bar": (Live, ("refresh",)),
    "lines": (logging.Handler, ("handle",)),
    "ranks in TensorBoard": (RankTracker, ("on_train_begin", "on_step_end")),
}


def timed(function: Callable[..., Any], seconds: dict[str, float], part: str) -> Any:
    """Return a function that adds the time of its calls to a part."""

    def call(*given: Any, **named: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*given, **named)
        finally:
            seconds[part] += time.thread_time() - began

    return call


def main() -> None:
    """Train, and write the shares."""
    seconds: dict[str, float] = defaultdict(float)
    for part, (owner, names) in TOLD.items():
        for name in names:
            setattr(owner, name, timed(getattr(owner, name), seconds, part))
    os.environ["FORCE_COLOR"] = "1"  # for rich, a terminal
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        tracked = ("--training.report_to", "[tensorboard]", "--output", str(run))
        code = run_dynlora(["train", *sys.argv[1:], *tracked])
        if code:
            sys.exit(code)
        values = json.loads((run / "run.json").read_text())
    whole = values["seconds"]["training_steps"]
    shares = {part: round(value / whole, 6) for part, value in seconds.items()}
    found = {
        "training_seconds": round(whole, 1),
        "steps": values["steps"],
        "share": shares,
        "share_of_all": round(sum(shares.values()), 6),
        "commit": current_commit(),
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
