"""Which rule for ranks loses least when a trained adapter is compressed.

Each adapter is one that `dynlora train examples/mrpc.yaml` wrote; nothing is trained here. Loss and
accuracy are from the validation split. `divergence` is the mean Kullback-Leibler divergence of the
compressed adapter's predictions from the whole adapter's, in nats: it measures the change itself,
good or bad. Activation-weighted rules see rows of the training split, without labels.

    python benchmarks/compress.py --model DIR --data DIR --adapters runs/mrpc/adapter ...
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet
import torch

from dynlora.adapter_files.activations import batch_texts, observe_texts, read_texts
from dynlora.adapter_files.adapter import SavedAdapter, read_adapter, write_adapter
from dynlora.adapter_files.adapter_base import BaseSource, attach, load_base
from dynlora.adapter_files.compress import cut_to, measure, plan_cut
from dynlora.adapter_files.layer import Components, Seen, find_components
from dynlora.adjuster import LayerBounds, grant_ranks, plan_ranks
from dynlora.allocator import allocate_shares

COLUMNS = {"--text": "sentence1", "--text-pair": "sentence2"}
Parts = Mapping[str, Components]
Views = Mapping[str, Seen]


def main() -> None:
    """Cut every adapter by every rule and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", type=Path, required=True, help="folder of MRPC's parquet files")
    parser.add_argument("--adapters", type=Path, nargs="+", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rows", type=int, default=256, help="rows that weighted rules see")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compress.json"))
    options = parser.parse_args()
    rows = []
    for folder in options.adapters:
        rows += _cut_all_ways(folder, options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"rows": options.rows, "results": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(_table(rows))


def _cut_all_ways(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    adapter = read_adapter(folder)
    source = BaseSource(options.model)
    texts = read_texts(options.data / "train.parquet", COLUMNS, options.rows)
    model = attach(adapter, load_base(adapter, source))
    seen = observe_texts(model, adapter, batch_texts(texts, source, None))
    batches, labels = _read_validation(options.data, source)

    def predict(cut: SavedAdapter) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as place, torch.no_grad():
            write_adapter(cut, Path(place) / "adapter")
            read = read_adapter(Path(place) / "adapter")
            adapted = attach(read, load_base(read, source))
            return torch.cat([adapted(**batch).logits for batch in batches]).log_softmax(dim=1)

    whole = predict(adapter)

    def judge(rule: str, part: float, cut: SavedAdapter) -> dict[str, object]:
        said = predict(cut)
        right = (said.argmax(dim=1) == labels).float().mean()
        row = {
            "adapter": folder.parent.name,
            "rule": rule,
            "budget": part,
            "parameters": cut.parameters,
            "divergence": float((whole.exp() * (whole - said)).sum(dim=1).mean()),
            "loss": float(torch.nn.functional.nll_loss(said, labels)),
            "accuracy": float(right),
        }
        print(row, flush=True)
        return row

    rows = [judge("whole", 1.0, adapter)]
    for part in options.budgets:
        budget = int(part * adapter.parameters)
        for rule, (weighted, plan) in RULES.items():
            views = seen if weighted else None
            parts = measure(adapter, views)
            ranks = plan(parts, seen, budget)
            made = cut_to(adapter, ranks, budget=budget, parts=parts, seen=views)
            rows.append(judge(rule, part, made.adapter))
    return rows


def _read_validation(
    data: Path, source: BaseSource
) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Return the validation split, texts of one length together, and its labels."""
    path = data / "validation.parquet"
    labels = pyarrow.parquet.read_table(path).column("label").to_pylist()
    texts = read_texts(path, COLUMNS, len(labels))
    order = sorted(range(len(labels)), key=lambda row: sum(len(text[row]) for text in texts))
    sorted_texts = [[text[row] for row in order] for text in texts]
    return batch_texts(sorted_texts, source, 128), torch.tensor([labels[row] for row in order])


def _bounds(parts: Parts) -> dict[str, LayerBounds]:
    return {
        name: LayerBounds(
            cost=part.layer.cost,
            floor=1,
            ceiling=max(1, len(part.values)),
            held=part.layer.r,
        )
        for name, part in parts.items()
    }


def _by_worth(value: Callable[[Components, int, Seen], float]) -> Callable[..., dict[str, int]]:
    """Return a rule that grants each rank to the layer with the highest value per parameter."""

    def plan(parts: Parts, seen: Views, budget: int) -> dict[str, int]:
        def worth(name: str, rank: int) -> float:
            return value(parts[name], rank - 1, seen[name]) / parts[name].layer.cost

        return grant_ranks(_bounds(parts), budget=budget, worth=worth)

    return plan


def _by_shares(score: Callable[[Components, Seen], float]) -> Callable[..., dict[str, int]]:
    """Return a rule that splits the budget as training does: by one score per layer."""

    def plan(parts: Parts, seen: Views, budget: int) -> dict[str, int]:
        bounds = _bounds(parts)
        costs = {name: bound.cost for name, bound in bounds.items()}
        scores = {name: score(part, seen[name]) for name, part in parts.items()}
        held = {name: bound.held for name, bound in bounds.items()}
        shares = allocate_shares(
            scores, costs, held=held, gains={}, temperature=0.5, uniform_mix=0.5
        )
        return plan_ranks(shares, bounds, budget=budget)

    return plan


def _by_weights(parts: Parts, _: Views, budget: int) -> dict[str, int]:
    """Return the ranks by energy without data, for any components."""
    blind = {name: find_components(part.layer) for name, part in parts.items()}
    return plan_cut(blind, budget)


def _uniform(parts: Parts, _: Views, budget: int) -> dict[str, int]:
    """Return the highest rank that all layers can have within the budget."""

    def cost(rank: int) -> int:
        return sum(min(rank, part.layer.r) * part.layer.cost for part in parts.values())

    highest = max(part.layer.r for part in parts.values())
    rank = max(rank for rank in range(1, highest + 1) if rank == 1 or cost(rank) <= budget)
    return {name: min(rank, part.layer.r) for name, part in parts.items()}


RULES: Mapping[str, tuple[bool, Callable[..., dict[str, int]]]] = {
    "uniform rank": (False, _uniform),
    "energy per parameter": (False, _by_worth(lambda part, k, _: part.energies[k])),
    "part of the layer's energy": (
        False, _by_worth(lambda part, k, _: part.energies[k] / part.energy)),
    "shares by norm": (False, _by_shares(
        lambda part, _: (part.energy / part.layer.cost) ** 0.5)),
    "weighted, uniform rank": (True, _uniform),
    "weighted, ranks by energy without data": (True, _by_weights),
    "weighted, output energy": (True, _by_worth(lambda part, k, _: part.energies[k])),
    "weighted, relative output energy": (
        True, _by_worth(lambda part, k, seen: part.energies[k] / seen.output_power)),
    "weighted, part of the layer's energy": (
        True, _by_worth(lambda part, k, _: part.energies[k] / part.energy)),
    "weighted, shares by relative output norm": (True, _by_shares(
        lambda part, seen: (part.energy / seen.output_power / part.layer.cost) ** 0.5)),
}  # fmt: skip
"""By name: whether components depend on outputs, and the function from components to ranks."""


def _table(rows: list[dict[str, object]]) -> str:
    lines = ["| adapter | budget | rule | parameters | divergence | loss | accuracy |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['adapter']} | {row['budget']:.1%} | {row['rule']} | {row['parameters']:,} "
            f"| {row['divergence']:.5f} | {row['loss']:.4f} | {row['accuracy']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
