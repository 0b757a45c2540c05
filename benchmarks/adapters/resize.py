"""Which rule for ranks and directions loses least when trained adapters are cut.

    python -m benchmarks.adapters.resize RUN ...

Each RUN is the folder of a `dynlora train ... --method lora` run; nothing is trained here. The
rules see rows of the training split. The judge sees other rows: of the validation split, or of the
training split with `--judge train`, on which a rule may be chosen. `output` is the root mean
square over layers of the lost output, relative to the layer's output. `divergence` is the mean
Kullback-Leibler divergence of the cut adapter's predictions from the whole adapter's, in nats: it
measures the change itself, good or bad. Both count each row, or each labelled token.

Writes `benchmarks/results/resize.json`.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, pad

from dynlora.adapter_files.activations import observe_texts
from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.layer import Components, SavedLayer, Seen, find_components
from dynlora.adapter_files.reader import read_adapter
from dynlora.adjuster import LayerBounds, grant_ranks
from dynlora.runs.folder import RunFolder
from dynlora.train.config import METRICS
from dynlora.train.config_file import read_job
from dynlora.train.finished_run import load_run
from dynlora.train.task import load_data, make_trainer

Parts = Mapping[str, Components]
Views = Mapping[str, Seen]


def main() -> None:
    """Cut every run's adapter by every rule and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25])
    parser.add_argument("--batches", type=int, default=16, help="batches that the rules see")
    parser.add_argument("--judged", type=int, default=1000, help="most batches to judge on")
    parser.add_argument("--judge", choices=("train", "validation"), default="validation")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resize.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for folder in options.runs:
        rows += _cut_all_ways(folder, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"batches": options.batches, "judge": options.judge, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(_table(rows))


def _cut_all_ways(root: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    folder = RunFolder(root)
    config = read_job(folder.config)
    run = load_run(folder, config)
    data = load_data(run.task, config.data, run.processor)
    trainer = make_trainer(
        run.task, config.training, run.processor, best_metric=METRICS[config.task][0],
        model=run.model, train_dataset=data.train, eval_dataset=data.validation,
    )  # fmt: skip
    known, judged = options.batches, options.judged
    loader = trainer.get_eval_dataloader
    seen_batches = list(islice(loader(data.train.shuffle(seed=0)), known))
    batches = (
        list(islice(loader(data.validation), judged))
        if options.judge == "validation"
        else list(islice(loader(data.train.shuffle(seed=0)), known, known + judged))
    )
    adapter = read_adapter(folder.adapter)
    seen = observe_texts(run.model, adapter, seen_batches)
    judge = Judge(run.model, adapter, batches)
    whole = {"run": root.name, "directions": "whole", "ranks": "whole", "budget": 1.0}
    rows = [{**whole, **judge.judge(adapter.layers, {}, {})}]
    kinds: dict[str, Parts] = {
        "SVD": {layer.name: find_components(layer) for layer in adapter.layers},
        "outputs": {
            layer.name: find_components(layer, seen[layer.name].gram) for layer in adapter.layers
        },
    }
    for part in options.budgets:
        budget = int(part * adapter.parameters)
        for (directions, name), worth in RULES.items():
            parts = kinds[directions]
            ranks = _plan(parts, kinds, seen, worth, budget)
            made = [parts[layer.name].cut(ranks[layer.name]) for layer in adapter.layers]
            row = {
                "run": root.name, "directions": directions, "ranks": name, "budget": part,
                **judge.judge(made, parts, ranks),
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    return rows


class Judge:
    """Compares a cut adapter with the whole one on batches with labels."""

    def __init__(self, model: Any, adapter: SavedAdapter, batches: list[Any]) -> None:
        self.model, self.adapter, self.batches = model, adapter, batches
        self.seen = observe_texts(model, adapter, batches)
        self.find = model.base_model.model.get_submodule
        self.said = [self._predict(batch) for batch in batches]

    @torch.no_grad()
    def judge(
        self, layers: Iterable[SavedLayer], parts: Parts, ranks: Mapping[str, int]
    ) -> dict[str, float]:
        """Return size, errors and task results of layers."""
        size = 0
        for layer in layers:
            size += layer.parameters
            module = self.find(layer.name)
            (name,) = module.active_adapters
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
            # The scaling stays, so zeros fill the rest.
            A.copy_(pad(layer.A, (0, 0, 0, len(A) - layer.r)))
            B.copy_(pad(layer.B, (0, B.shape[1] - layer.r)))
        divergence = loss = right = count = 0.0
        for batch, (before, labels) in zip(self.batches, self.said, strict=True):
            now, _ = self._predict(batch)
            divergence += float((before.exp() * (before - now)).sum())
            loss += float(nll_loss(now, labels, reduction="sum"))
            right += float((now.argmax(dim=1) == labels).sum())
            count += len(labels)
        errors = [self._lost(part, ranks[name]) for name, part in parts.items()]
        return {
            "parameters": size,
            "output": math.sqrt(sum(errors) / max(1, len(errors))),
            "divergence": divergence / count,
            "loss": loss / count,
            "accuracy": right / count,
        }

    def _lost(self, part: Components, rank: int) -> float:
        """Return the squared norm of the lost output, relative to the output's."""
        seen, layer = self.seen[part.layer.name], part.layer
        rest = torch.eye(layer.r).double() - part.to_B[:, :rank] @ part.to_A[:rank]
        left = layer.B.double() @ rest * layer.scaling
        return float((left @ seen.gram * left).sum()) / seen.output_power

    @torch.no_grad()
    def _predict(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log probabilities and labels per row, or per labelled token."""
        logits, labels = self.model(**batch).logits, batch["labels"]
        if labels.dim() > 1:
            logits, labels = logits[:, :-1], labels[:, 1:]
        some = labels != -100
        return logits[some].float().log_softmax(dim=1), labels[some]


Worth = Callable[[str, int, Mapping[str, Parts], Views], float]
"""Value of a layer's next component, from its place, for parts of all kinds."""


def _plan(
    parts: Parts, kinds: Mapping[str, Parts], seen: Views, worth: Worth | None, budget: int
) -> dict[str, int]:
    if worth is None:
        return _uniform(parts, budget)
    bounds = {
        name: LayerBounds(
            cost=part.layer.cost, floor=1, ceiling=max(1, len(part.values)), held=part.layer.r
        )
        for name, part in parts.items()
    }
    values = {
        name: [worth(name, place, kinds, seen) for place in range(bound.ceiling)]
        for name, bound in bounds.items()
    }
    return grant_ranks(
        bounds, budget=budget, worth=lambda name, rank: values[name][rank - 1] / bounds[name].cost
    )


def _uniform(parts: Parts, budget: int) -> dict[str, int]:
    """Return the highest rank that all layers can have within the budget."""

    def cost(rank: int) -> int:
        return sum(min(rank, part.layer.r) * part.layer.cost for part in parts.values())

    highest = max(part.layer.r for part in parts.values())
    rank = max(rank for rank in range(1, highest + 1) if rank == 1 or cost(rank) <= budget)
    return {name: min(rank, part.layer.r) for name, part in parts.items()}


def _energy(kind: str, divisor: Callable[[str, Mapping[str, Parts], Views], float]) -> Worth:
    """Return a rule by energies of a kind, relative to a number per layer."""

    def worth(name: str, place: int, kinds: Mapping[str, Parts], seen: Views) -> float:
        energies = kinds[kind][name].values.square()
        return float(energies[place]) / divisor(name, kinds, seen) if place < len(energies) else 0.0

    return worth


BY_WEIGHTS = _energy("SVD", lambda *_: 1.0)
BY_PART = _energy("SVD", lambda name, kinds, _: kinds["SVD"][name].energy)
RULES: Mapping[tuple[str, str], Worth | None] = {
    ("SVD", "one rank"): None,
    ("SVD", "energy"): BY_WEIGHTS,
    ("SVD", "part of the layer's energy"): BY_PART,
    ("outputs", "one rank"): None,
    ("outputs", "energy"): BY_WEIGHTS,
    ("outputs", "output energy"): _energy("outputs", lambda *_: 1.0),
    ("outputs", "output energy by norm"): _energy(
        "outputs", lambda name, _, seen: seen[name].output_power ** 0.5
    ),
    ("outputs", "relative output energy"): _energy(
        "outputs", lambda name, _, seen: seen[name].output_power
    ),
}
"""By directions and ranks: the value per component; None for one rank everywhere."""


def _table(rows: list[dict[str, Any]]) -> str:
    names = ("run", "budget", "directions", "ranks", "parameters")
    figures = ("output", "divergence", "loss", "accuracy")
    lines = [f"| {' | '.join((*names, *figures))} |", "| --- " * (len(names) + len(figures)) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in names] + [f"{row[name]:.5f}" for name in figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
