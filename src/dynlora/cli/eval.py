"""`dynlora eval RUN`: compute metrics of a finished run's model on any split or file."""

from typing import Any

from dynlora.cli.arguments import FILE, LOADED_RUN, OVERWRITE, Verb, flag, open_run, option
from dynlora.cli.output import Output, readable_messages


def _run(given: Any, output: Output) -> None:
    from dynlora.files.json_files import finite, write_json
    from dynlora.train.data.splits import find_rows
    from dynlora.train.finished_run import evaluate_run
    from dynlora.train.predictions import check_replaceable, exact_match

    if given.output is not None:
        check_replaceable(given.output, overwrite=given.overwrite)
    with readable_messages(output.progress):
        found = open_run(given.run, given.model, given.input_adaptive)
        rows = find_rows(found.config.data, given.split, given.data)
        matched = {}
        if given.exact_match:
            matched["exact_match"] = exact_match(found, rows, given.batch_size)
        result = evaluate_run(found, rows, given.batch_size)
    values = finite(_values(given, found, rows, result))
    values["metrics"] |= matched
    if given.output is not None:
        write_json(given.output, values)
    output.show(_table(values), values)


def _values(given: Any, found: Any, rows: Any, result: Any) -> dict[str, Any]:
    """Return JSON-ready results; `input_adaptive` only for runs trained with it."""
    values = {
        "run": str(given.run),
        "task": found.config.task,
        "method": found.config.method,
        "split": rows.name,
        "source": rows.source,
        "rows": result.rows,
        "cut": result.cut,
        "metrics": dict(result.metrics),
        "classes": result.classes,
        "collapsed": result.collapsed,
    }
    if found.config.method == "dynamic" and found.config.dynamic.input_adaptive:
        values["input_adaptive"] = given.input_adaptive != "off"
    return values


def _table(values: dict[str, Any]) -> Any:
    from dynlora.report.results import fact_table

    cut = f", {values['cut']:,} cut" if values["cut"] else ""
    facts = {
        "run": f"{values['run']} (method {values['method']})",
        "rows": f"{values['rows']:,} of {values['source']} ({values['split']}){cut}",
    }
    if "input_adaptive" in values:
        facts["input-adaptive"] = "on" if values["input_adaptive"] else "off"
    metrics = {
        name: "not finite" if value is None else f"{value:.4f}"
        for name, value in values["metrics"].items()
    }
    collapsed = {}
    if values["collapsed"] is not None:
        given, name = values["collapsed"], values["classes"][values["collapsed"]]["name"]
        called = "" if name is None else f" ({name})"
        collapsed["collapsed"] = f"every row was given class {given}{called}, whatever its label"
    title = f"dynlora eval: {values['task']}"
    return fact_table(title, facts.items(), metrics.items(), collapsed.items())


COMMAND = Verb(
    "eval",
    "metrics of a finished run, on any split or file",
    _run,
    [
        *LOADED_RUN,
        option("--split NAME", "Split of the data (default: the run's validation split)."),
        option(
            "--data FILE_OR_FOLDER",
            "Other data with the same columns: a file, or a folder with the split.",
            FILE,
        ),
        flag(
            "--exact-match",
            "Also write the answers, and tell the share that equals one of the data.",
        ),
        option("--output FILE", "Also write the result to a new JSON file.", FILE),
        OVERWRITE,
    ],
)
