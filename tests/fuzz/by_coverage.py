"""Fuzzing guided by coverage: files that take a reader to new lines are changed further.

It needs atheris, and continues until a reader breaks its promise, or as long as libFuzzer is told:

    python -m tests.fuzz.by_coverage run/ranks.jsonl -max_total_time=600

`make fuzz` runs all readers of text. A file that broke a promise is left as `crash-*`.
"""

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

INSTRUMENTED = ["dynlora", "yaml", "json"]
with atheris.instrument_imports(include=INSTRUMENTED):
    from tests.fuzz.reading import read
    from tests.fuzz.targets import TARGETS, make_files

SECONDS = 5.0
"""Processor time limit per file; instrumented code is several times as slow."""
LIMITS = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1")
"""Limits of libFuzzer. With a shorter timeout its timer ends Python before the file is written."""


def main() -> None:
    """Fuzz one target."""
    logging.disable()
    warnings.simplefilter("ignore")
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as place:
        folder, corpus = make_files(Path(place)), Path(place, "corpus")
        path, order = folder / name, TARGETS[name].order(folder)
        corpus.mkdir()
        (corpus / "good").write_bytes(path.read_bytes())
        with atheris.instrument_imports(include=INSTRUMENTED):  # verbs import when they run
            assert read(*order) == [], "the good file must be read"

        def check(content: bytes) -> None:
            path.write_bytes(content)
            start = time.process_time()
            read(*order)
            taken = time.process_time() - start
            assert taken < SECONDS, f"it took {taken:.1f} s"

        text = ["-only_ascii=1"] if path.suffix in {".json", ".jsonl", ".yaml"} else []
        atheris.Setup([sys.argv[0], *LIMITS, *text, *options, str(corpus)], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
