"""Federated training with adapters of equal and of unequal ranks, averaged on disk.

    python -m benchmarks.adapters.federated benchmarks/studies/federated.toml --data DATA

The study's file states arms, rule and metric. Appends one row per run to `federated.csv`; a killed
process continues. `--report` prints the table instead.
"""

import copy
import dataclasses
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.data import derive
from benchmarks.harness.report.statistics import bootstrap_interval
from benchmarks.recovery.arms import FROZEN
from benchmarks.resumable.appended import AppendedTable, current_commit
from benchmarks.resumable.search import best_of, next_trial
from benchmarks.resumable.time_limit import TIME_UP, TimeLimit, TimeUpError, study_options
from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.combine import combine
from dynlora.adapter_files.reader import read_adapter
from dynlora.adapter_files.resize import plan_budget, resize
from dynlora.adapter_files.writer import write_adapter

COLUMNS = ("kind", "arm", "seed", "learning_rate", "loss", "accuracy", "parameters", "commit")
FACTORS, DYNAMIC = "factors", "dynamic"
CLASSES = 5
EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True)
class Rows:
    """Texts, padded with 0, and their classes."""

    ids: Int[Tensor, "rows tokens"]
    labels: Int[Tensor, " rows"]

    def at(self, places: Any) -> "Rows":
        """Return some rows."""
        return Rows(self.ids[places], self.labels[places])

    def inputs(self) -> dict[str, Tensor]:
        """Return the model's inputs, as long as the longest row."""
        mask = self.ids != 0
        longest = int(mask.sum(1).max())
        return {"input_ids": self.ids[:, :longest], "attention_mask": mask[:, :longest].long()}


class Federation:
    """Server, clients and rows of a study."""

    def __init__(self, study: dict[str, Any], data: Path) -> None:
        """Load the model and divide the rows among the clients."""
        self.study = study
        folder = derive.minilm()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        self.base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)

        def read(split: str) -> Rows:
            table = pq.read_table(data / "medical_abstracts" / f"{split}.parquet").to_pydict()
            ids = tokenizer(
                table["text"], truncation=True, max_length=study["tokens"], padding=True,
                return_tensors="pt",
            ).input_ids  # fmt: skip
            return Rows(ids, torch.tensor(table["label"]))

        train, self.test = read("train"), read("test")
        draw = np.random.default_rng(study["split_seed"])
        order = draw.permutation(len(train.labels))
        held = study["validation_rows"]
        self.validation = train.at(order[:held])
        count = len(study["ranks"][FACTORS])
        parts: list[list[int]] = [[] for _ in range(count)]
        for label in range(CLASSES):
            places = [n for n in order[held:] if train.labels[n] == label]
            shares = draw.dirichlet([study["concentration"]] * count)
            ends = (shares.cumsum() * len(places)).round().astype(int)
            for part, start, end in zip(parts, [0, *ends[:-1]], ends, strict=True):
                part.extend(places[start:end])
        self.clients = [train.at(part) for part in parts]

    def run(self, arm: str, seed: int, learning_rate: float, rows: Rows) -> dict[str, Any]:
        """Train an arm; return loss and accuracy of the last mean, and its clients' parameters."""
        ranks = self.study["ranks"][arm]
        sizes = [len(client.labels) for client in self.clients]
        weights = [size / sum(sizes) for size in sizes]
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            starts = [self._begin(root / f"start-{n}", rank, seed) for n, rank in enumerate(ranks)]
            budgets = [read_adapter(start).parameters for start in starts]
            for turn in range(self.study["rounds"]):
                sent = [
                    self._train(
                        start, root / f"{turn}-{n}", arm, seed + turn, learning_rate, client
                    )
                    for n, (start, client) in enumerate(zip(starts, self.clients, strict=True))
                ]
                adapters = [read_adapter(folder) for folder in sent]
                made = (
                    average_factors(adapters, weights)
                    if arm == FACTORS
                    else combine(adapters, weights)
                )
                middle = root / f"{turn}-mean"
                write_adapter(made, middle)
                if arm == FACTORS:
                    starts = [middle] * len(ranks)
                    continue
                saved, starts = read_adapter(middle), []
                for n, (rank, budget) in enumerate(zip(ranks, budgets, strict=True)):
                    plan = dict.fromkeys((layer.name for layer in saved.layers), rank)
                    if arm == DYNAMIC:
                        plan = plan_budget(saved, budget)
                    starts.append(root / f"{turn}-start-{n}")
                    resize(saved, plan, starts[-1])
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), middle)
            loss, accuracy = evaluate(model, rows)
        return {"loss": loss, "accuracy": accuracy, "parameters": sum(budgets)}

    def _begin(self, folder: Path, rank: int, seed: int) -> Path:
        """Save a new adapter."""
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="SEQ_CLS", r=rank, lora_alpha=rank,
            target_modules=["query", "key", "value", "dense"], exclude_modules=r".*pooler.*",
        )  # fmt: skip
        get_peft_model(copy.deepcopy(self.base), config).save_pretrained(folder)
        return folder

    def _train(
        self, start: Path, out: Path, arm: str, seed: int, learning_rate: float, rows: Rows
    ) -> Path:
        """Train a client's adapter for one epoch, and save it."""
        torch.manual_seed(seed)
        model = PeftModel.from_pretrained(
            copy.deepcopy(self.base), start, is_trainable=True
        ).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        batches = torch.randperm(len(rows.labels)).split(self.study["batch"])
        settings = {"total_steps": len(batches)} if arm == DYNAMIC else FROZEN
        dynamic = DynamicLora(model, optimizer, DynamicLoraConfig(**settings))
        for places in batches:
            batch = rows.at(places)
            cross_entropy(model(**batch.inputs()).logits, batch.labels).backward()
            dynamic.observe()
            optimizer.step()
            dynamic.step()
            optimizer.zero_grad()
        dynamic.close()
        model.save_pretrained(out)
        return out


def average_factors(adapters: list[SavedAdapter], weights: list[float]) -> SavedAdapter:
    """Return the adapter with the weighted means of each factor, as FedAvg averages any weight."""
    exact = combine(adapters, weights)  # of whose tensors the classifier is averaged
    layers = []
    for versions in zip(*(adapter.layers for adapter in adapters), strict=True):
        A, B = (
            sum(
                weight * getattr(layer, name)
                for weight, layer in zip(weights, versions, strict=True)
            )
            for name in ("lora_A", "lora_B")
        )
        layers.append(dataclasses.replace(versions[0], lora_A=A, lora_B=B))
    return exact.with_layers(layers)


@torch.no_grad()
def evaluate(model: Any, rows: Rows) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    logits = torch.cat(
        [
            model(**rows.at(places).inputs()).logits
            for places in torch.arange(len(rows.labels)).split(EVALUATION_BATCH)
        ]
    )
    right = logits.argmax(1) == rows.labels
    return float(cross_entropy(logits, rows.labels)), float(right.float().mean())


def finish(
    federation: Federation, table: AppendedTable, limit: TimeLimit, seeds: list[int]
) -> None:
    """Execute the missing trials and final runs.

    Raises:
        TimeUpError: If runs are missing.
    """
    study = federation.study

    def add(kind: str, arm: str, seed: int, rate: float, rows: Rows) -> None:
        limit.check()
        found = federation.run(arm, seed, rate, rows)
        row = {"kind": kind, "arm": arm, "seed": seed, "learning_rate": rate, **found}
        table.append(row | {"commit": current_commit()})
        print(*row.values(), flush=True)

    first = [(rate,) for rate in study["learning_rates"]]
    for arm in study["ranks"]:
        while True:
            rows = table.select(kind="trial", arm=arm)
            ended = {(row["learning_rate"],): float(row["loss"]) for row in rows}
            most = len(first) + study["more_trials"]
            point = next_trial(first, ended, most=most, moving=1)
            if point is None:
                break
            add("trial", arm, study["tuning_seed"], point[0], federation.validation)
        for seed in seeds:
            if table.find(kind="final", arm=arm, seed=seed) is None:
                add("final", arm, seed, best_of(ended)[0], federation.test)


def report(table: AppendedTable) -> str:
    """Return the table of final runs."""
    lines = ["| arm | parameters | loss | accuracy | loss less factors |", "| --- " * 5 + "|"]
    whole = {row["seed"]: row for row in table.select(kind="final", arm=FACTORS)}
    for arm in dict.fromkeys(row["arm"] for row in table.select(kind="final")):
        rows = {row["seed"]: row for row in table.select(kind="final", arm=arm)}
        pairs = [rows[s]["loss"] - whole[s]["loss"] for s in rows if s in whole]
        low, high = bootstrap_interval(pairs) if len(pairs) > 1 else (pairs[0], pairs[0])
        parts = [mean(row[name] for row in rows.values()) for name in ("loss", "accuracy")]
        lines.append(
            f"| {arm} | {next(iter(rows.values()))['parameters']} | {parts[0]:.4f} "
            f"| {parts[1]:.3f} | {mean(pairs):+.4f} [{low:+.4f}, {high:+.4f}] |"
        )
    return "\n".join(lines)


def main() -> int:
    """Execute the missing runs, or print the table."""
    parser = study_options(__doc__, "runs/federated")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    study = tomllib.loads(options.study.read_text())
    table = AppendedTable(options.out / f"{options.study.stem}.csv", COLUMNS)
    if options.report:
        print(report(table))
        return 0
    try:
        finish(
            Federation(study, options.data), table, TimeLimit(options.minutes),
            options.seeds or study["seeds"],
        )  # fmt: skip
    except TimeUpError:
        return TIME_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
