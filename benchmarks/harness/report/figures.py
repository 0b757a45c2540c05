"""Step 6. Draw the figures of a study, with file names and captions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.report.comparison import PairedComparison
from benchmarks.harness.report.curves import curves_figure
from benchmarks.harness.report.forest import forest_figure
from benchmarks.harness.report.rank_maps import moved_patterns, rank_figure
from benchmarks.harness.report.results import StudyResults


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of one model and task."""

    file: str
    caption: str
    """Alternative text."""
    content: bytes


def draw(
    study: StudyResults,
    setting: tuple[str, str],
    comparisons: Sequence[PairedComparison],
    reference: str,
    stem: str,
) -> list[Drawing]:
    """Return the figures of a model and task that have data.

    Args:
        study: The study.
        setting: Model and task.
        comparisons: Comparisons of the model and task.
        reference: Reference method.
        stem: Prefix of the file names.
    """
    methods = study.methods(first=reference)
    patterns = moved_patterns(study, setting, reference)
    where = f"{setting[1]} with {setting[0]}"
    found = [
        (
            "curves",
            f"{where}: loss and metric against parameters",
            curves_figure(study, setting, reference),
        ),
        (
            "differences",
            f"{where}: paired differences from {reference}",
            forest_figure(comparisons, reference, methods),
        ),
        (
            "ranks",
            f"{where}: mean final rank of each layer",
            rank_figure(patterns) if patterns else None,
        ),
    ]
    return [
        Drawing(f"{stem}-{name}.svg", caption, content)
        for name, caption, content in found
        if content
    ]


def stems(studies: Sequence[StudyResults]) -> dict[tuple[str, tuple[str, str]], str]:
    """Return a short, unique prefix of file names per study and setting."""
    given: dict[tuple[str, tuple[str, str]], str] = {}
    for study in studies:
        for model, task in study.settings:
            words = [study.name, model.rstrip("/").rpartition("/")[2], task]
            plain = "-".join(
                re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words
            )
            stem, number = plain, 2
            while stem in given.values():
                stem, number = f"{plain}-{number}", number + 1
            given[study.name, (model, task)] = stem
    return given
