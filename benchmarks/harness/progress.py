"""Output of `python -m benchmarks`: a line per run, the final table, and the dry run's list."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.harness.records import Records
from benchmarks.harness.runner import Selection
from benchmarks.harness.runs import Combination, Jobs, Run
from benchmarks.harness.study import Study
from dynlora.cli.output import Output

Record = Mapping[str, Any]


@dataclass(slots=True)
class Progress:
    """Prints a line per run and collects the results."""

    output: Output
    study: Study
    total: int
    """Number of runs, trials included."""
    runs: list[tuple[Run, Record, bool]] = field(default_factory=list)
    """Runs, with their records and whether these existed before."""

    def watch(self, run: Run, record: Record, was_there: bool) -> None:
        """Add a run, and print a line if it is new."""
        self.runs.append((run, record, was_there))
        if was_there:
            return
        found = ": ".join(word for word in (record["status"], record["error"]) if word)
        if record["status"] == "completed":
            found = f"{_metrics(record)}, {record['seconds']['whole']:.0f} s"
        line = f"{self.study.name} {len(self.runs)} of {self.total}: {run.name}: {found}"
        self.output.progress.print(Text(" ".join(line.split())), soft_wrap=True)

    @property
    def unfinished(self) -> int:
        """Number of final runs that did not complete."""
        finals = [record for run, record, _ in self.runs if run.kind == "final"]
        return sum(record["status"] != "completed" for record in finals)

    def show(self, problems: Sequence[str]) -> None:
        """Print the result of all runs."""
        study, told = self.study, ("status", "error", "main_metric", "validation", "test", "tuned")
        runs = [
            {"name": run.name, "kind": run.kind, "key": run.key, "was_there": was_there}
            | {key: record[key] for key in told}
            for run, record, was_there in self.runs
        ]
        values = {"study": study.name, "results": str(study.results), "problems": [*problems]}
        self.output.show(self._summary(), values | {"runs": runs})

    def _summary(self) -> Table:
        table = Table(title=self.study.name, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for kind in ("trial", "final"):
            mine = [(record, there) for run, record, there in self.runs if run.kind == kind]
            if mine:
                counts = Counter(record["status"] for record, _ in mine)
                text = ", ".join(f"{count} {status}" for status, count in counts.items())
                there = sum(was_there for _, was_there in mine)
                table.add_row(f"{kind} runs", Text(f"{text}; {there} were there before"))
        table.add_row("records", Text(str(self.study.results)))
        return table


def trials_of(study: Study, combinations: Sequence[Combination]) -> int:
    """Return the total number of trials for the combinations."""
    return 0 if study.tune is None else study.tune.trials * len(combinations)


def show_outlook(output: Output, jobs: Jobs, records: Records, selection: Selection) -> None:
    """Print the state of every final run, or of its trials if they are missing."""
    study = jobs.study
    table = Table(title=f"{study.name} (--dry-run)", show_header=False)
    runs = []
    for combination, seed in selection.finals:
        name, state = f"{combination.name}/s{seed}", _state(jobs, records, combination, seed)
        table.add_row(Text(name), Text(state))
        runs.append({"name": name, "state": state})
    values = {
        "dry_run": True,
        "study": study.name,
        "results": str(study.results),
        "trials": trials_of(study, selection.combinations),
        "runs": runs,
    }
    output.show(table, values)


def _state(jobs: Jobs, records: Records, combination: Combination, seed: int) -> str:
    tuning = jobs.study.tune
    if tuning is None:
        return records.status(jobs.final(combination, seed, None)) or "to do"
    known = records.status_at(combination, seed)
    if known is not None:
        return f"{known}, if its tuning stays"
    return f"to do; {records.trials(combination)} of {tuning.trials} trials are there"


def _metrics(record: Record) -> str:
    """Format a completed run's main metric and loss on validation rows and, if any, test rows."""
    parts = []
    for split in ("validation", "test"):
        if record[split] is not None:
            found = {name: record[split][name] for name in (record["main_metric"], "loss")}
            texts = [f"{k} {'not finite' if v is None else f'{v:.4f}'}" for k, v in found.items()]
            parts.append(f"{split} {', '.join(texts)}")
    return "; ".join(parts)
