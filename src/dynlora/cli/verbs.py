"""Verbs with usage and summary; `run(arguments, output)` in `dynlora.cli.<verb>` runs one."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb's entry in the help."""

    usage: str
    summary: str


VERBS: Mapping[str, Verb] = {
    "train": Verb("train CONFIG", "train and evaluate as CONFIG (a YAML file) says"),
    "plan": Verb("plan CONFIG", "parameters per method before a run; peak memory with --measure"),
    "eval": Verb("eval RUN", "metrics of a finished run, on any split or file"),
    "predict": Verb("predict RUN FILE", "what a finished run's model says to each row of FILE"),
    "report": Verb("report RUN", "one HTML file about a run: ranks, diagram, losses, events"),
    "compare": Verb("compare A B", "two runs side by side: metrics, parameters, ranks"),
    "inspect": Verb("inspect ADAPTER", "a LoRA adapter's layers: rank, parameters, energy"),
    "export": Verb("export ADAPTER", "rewrite an adapter for a server, or merge it"),
    "compress": Verb("compress ADAPTER", "cut any LoRA adapter down to a budget, no training"),
    "schema": Verb("schema", "JSON Schema of CONFIG, for editors"),
    "completion": Verb("completion SHELL", "completion script for bash, zsh or tcsh"),
}
