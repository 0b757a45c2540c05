"""`dynlora compare A B ...`: read finished runs and print their differences."""

from typing import Any

from dynlora.cli.arguments import RUNS, Verb
from dynlora.cli.output import Output
from dynlora.errors import ConfigError


def _run(given: Any, output: Output) -> None:
    if len(given.runs) < 2:
        names = f"got {len(given.runs)}" + "".join(f", {path}" for path in given.runs)
        raise ConfigError(f"`dynlora compare` needs at least two runs, {names}: give another.")

    from dynlora.report.run_comparison import compare_runs, comparison_table, read_finished

    found = compare_runs([read_finished(path) for path in given.runs])
    output.show(comparison_table(found), found.to_dict())


COMMAND = Verb("compare", "two runs side by side: metrics, parameters, ranks", _run, [RUNS])
