"""BLEU and ROUGE-L of the runs of the study `decoder`.

Loads the run folders of `python -m benchmarks ... --keep-runs RUNS`. Each model describes the same
tables of the test split, greedily. Its texts are compared with all human texts for the table: BLEU
by sacrebleu over the corpus, and ROUGE-L by rouge-score, the best over a table's texts, averaged
over tables. Writes one JSON, updated after each run, and prints a table.

    pip install sacrebleu rouge-score
    python -m benchmarks.decoder RUNS --data DATA
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from scipy.stats import t as student

from benchmarks.harness.records import RecordFiles
from dynlora.cli.arguments import open_run
from dynlora.train.task import Predictor
from dynlora.train.tasks.causal_lm import continuations

BATCH = 32


def main() -> None:
    """Score every kept run that has no scores yet, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds e2e_nlg")
    parser.add_argument("--tables", type=int, default=48)
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results/decoder.csv"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decoder.json"))
    options = parser.parse_args()
    tables = _tables(options.data / "e2e_nlg" / "test.parquet", options.tables)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for record in RecordFiles(options.records.parent, options.records.stem).read():
        if record["kind"] != "final":
            continue
        name = f"{record['method']} r={record['budget']}"
        cell = found.setdefault(name, {})
        if str(record["seed"]) not in cell:
            cell[str(record["seed"])] = _measure(_folder(options.runs, record), tables)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, "seed", record["seed"], cell[str(record["seed"])]["bleu"], flush=True)
    print(_table(found))


def _tables(path: Path, count: int) -> dict[str, list[str]]:
    """Return the first tables of a file with their human texts."""
    rows = pd.read_parquet(path)
    groups = rows.groupby("mr", sort=False)["ref"].apply(list)
    return dict(groups.iloc[:count].items())


def _folder(runs: Path, record: dict[str, Any]) -> Path:
    """Return the kept folder of a record."""
    cell = Path(record["model"], record["task"], record["method"], f"r{record['budget']}")
    return runs / cell / f"s{record['seed']}-{record['key']}"


def _measure(folder: Path, tables: dict[str, list[str]]) -> dict[str, Any]:
    """Return the scores of a run's texts, and the first texts as examples."""
    run = open_run(folder, None, None)
    data = run.config.data
    prompts = [run.processor(table + data.separator)["input_ids"] for table in tables]
    predictor = Predictor(model=run.model, processor=run.processor, batch_size=BATCH)
    said = [text.strip() for text in continuations(predictor, prompts, data.max_new_tokens)]
    wanted = list(tables.values())
    # sacrebleu expects the first text of every table, then the second, and so on; None if missing.
    most = max(map(len, wanted))
    columns = [[r[i] if i < len(r) else None for r in wanted] for i in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [
        scorer.score_multi(refs, text)["rougeL"].fmeasure
        for refs, text in zip(wanted, said, strict=True)
    ]
    return {
        "bleu": BLEU().corpus_score(said, columns).score,
        "rouge_l": 100 * mean(rouge),
        "words": mean(len(text.split()) for text in said),
        "examples": said[:3],
    }


def _table(found: dict[str, Any]) -> str:
    lines = [
        "| setting | seeds | BLEU | ROUGE-L |",
        "| --- | --- | --- | --- |",
    ]
    for name, cell in sorted(found.items()):
        cells = [_spread([run[m] for run in cell.values()]) for m in ("bleu", "rouge_l")]
        lines.append(f"| {name} | {len(cell)} | {' | '.join(cells)} |")
    for name, cell in sorted(found.items()):
        other = found.get(name.replace("dynamic", "lora"))
        if other is None or not name.startswith("dynamic"):
            continue
        for metric in ("bleu", "rouge_l"):
            pairs = [cell[s][metric] - other[s][metric] for s in cell if s in other]
            lines.append(f"\n{name} less lora, {metric}: {_interval(pairs)}")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"


def _interval(values: list[float]) -> str:
    """Return the mean of paired differences with its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{mean(values):+.2f} (one seed)" if values else "no pairs"
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.2f} [{mean(values) - half:+.2f}, {mean(values) + half:+.2f}]"


if __name__ == "__main__":
    main()
