"""`dynlora compare A B ...`: read finished runs and print their differences."""

from typing import Any

from dynlora.cli.arguments import RUNS, Verb
from dynlora.cli.output import Output
from dynlora.errors import ConfigError


def _run(given: Any, output: Output) -> None:
    if len(given.runs) < 2:
        raise ConfigError(f"RUN must be two runs or more, but got {given.runs[0]}. Give another.")

    from dynlora.report.run_comparison import compare_runs, comparison_table, read_finished

    found = compare_runs([read_finished(path) for path in given.runs])
    output.show(comparison_table(found), found.to_dict())


COMMAND = Verb("compare", "two runs side by side: metrics, parameters, ranks", _run, [RUNS])
