"""Fuzzing that follows coverage: files that take a reader of ours to new lines are changed further.

The tests here change what a file's structure offers; this meets conditions that nobody thought of.
It needs atheris, and goes on until a reader breaks its promise, or as long as libFuzzer is told to:

    python -m tests.fuzz.by_coverage ranks.jsonl -max_total_time=600

`make fuzz` runs all readers. A file that broke a promise is left as `crash-*` or `timeout-*`.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dynlora", "yaml", "json"]):
    from benchmarks.harness.study import read_study
    from dynlora.adapter_files.adapter import read_adapter
    from dynlora.adapter_files.names import match_names
    from dynlora.cli.job_parser import parse_job
    from dynlora.errors import DynamicLoraError
    from dynlora.files.plain_values import parse_json, parse_yaml
    from dynlora.runs.reader import read_run

import yaml

from tests.adapters import save_adapter
from tests.harness.studies import TUNE, study_values
from tests.jobs import job_values
from tests.unit.report.runs import block_names, make_events, write_run

Read = Callable[[bytes], object]
SECONDS = 5.0
"""Processor time that a file may take: instrumented code is several times as slow."""
LIMITS = ("-timeout=60", "-rss_limit_mb=4096", "-max_len=65536", "-print_final_stats=1")
"""Against what never ends, and for half a gigabyte of libraries and little else. With a shorter
timeout libFuzzer's timer ends Python before the file is written that broke a promise."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Something that reads files."""

    read: Read
    """Reads a file's content: it ends, or raises `refusal`."""
    good: bytes
    """A file that is as it should be, to begin with."""
    refusal: type[Exception] = DynamicLoraError


def main() -> None:
    """Fuzz one reader."""
    logging.disable()
    warnings.simplefilter("ignore")
    name, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        reader = make_readers(place)[name]
        corpus = place / "corpus"
        corpus.mkdir()
        (corpus / "good").write_bytes(reader.good)
        reader.read(reader.good)  # or all that follows would be refused at once
        text = [] if name.endswith(".safetensors") else ["-only_ascii=1"]
        atheris.Setup([sys.argv[0], *LIMITS, *text, *options, str(corpus)], _promise(reader))
        atheris.Fuzz()


def make_readers(place: Path) -> Mapping[str, Reader]:
    """Return every reader by the name of its file.

    Args:
        place: A folder for good files.
    """
    run, adapter = place / "run", place / "run" / "adapter"
    write_run(run, events=make_events(block_names(1), [10, 40, 70]))
    save_adapter(adapter, "patterns")
    some_json = json.dumps(job_values(place, place, place)).encode()
    some_yaml = yaml.safe_dump(study_values(tune=TUNE)).encode()
    readers = {
        "json": Reader(_text(parse_json), some_json, ValueError),
        "yaml": Reader(_text(parse_yaml), some_yaml, ValueError),
        "patterns": Reader(_text(_match), b"layers.(0|1).*_proj"),
    }
    for name in ("ranks.jsonl", "metrics.jsonl", "run.json", "config.yaml"):
        readers[name] = _file(run / name, lambda path: read_run(path.parent))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        readers[name] = _file(adapter / name, lambda path: read_adapter(path.parent))
    job, study = place / "job.yaml", place / "study.yaml"
    job.write_text(yaml.safe_dump(job_values(place / "model", place / "rows", place / "out")))
    study.write_bytes(some_yaml)
    readers["job.yaml"] = _file(job, lambda path: parse_job([str(path)]))
    readers["study.yaml"] = _file(study, read_study)
    return readers


def _promise(reader: Reader) -> Read:
    def check(content: bytes) -> None:
        start = time.process_time()
        with suppress(reader.refusal):
            reader.read(content)
        taken = time.process_time() - start
        assert taken < SECONDS, f"it took {taken:.1f} s"

    return check


def _text(parse: Callable[[str], object]) -> Read:
    return lambda content: parse(content.decode("utf-8", "ignore"))


def _match(pattern: str) -> None:
    names = ["model.layers.0.self_attn.q_proj", "a" * 100]
    match_names({pattern: 2}, names, 1, field="rank_pattern", where="a test")


def _file(path: Path, use: Callable[[Path], object]) -> Reader:
    def read(content: bytes) -> None:
        path.write_bytes(content)
        use(path)

    return Reader(read, path.read_bytes())


if __name__ == "__main__":
    main()
