"""Planted needs: a teacher is the student's base plus a change of known rank in known layers.

The student, with LoRA of low rank on all 24 layers, learns the teacher's hidden states. The need is
concentrated in two layers or spread over all, with the same total change: where a method puts its
budget, and what that is worth, can be told from the outside.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.importance import build_metric
from tests.models import adamw, bare_bert

RANK = 4
SCALE = 2.0
CHANGE_RANK = 24
SPREAD_RANK = 2
STEPS = 600
BATCH, LENGTH, VOCABULARY = 16, 16, 64


def concentrated_layers(seed: int) -> list[str]:
    """Return the two layers that are changed.

    Queries and keys are left alone: attention in a random model hardly depends on them, so that a
    change there is no need that could be found.
    """
    able = [n for n in _linears(bare_bert(seed=seed)) if "query" not in n and "key" not in n]
    generator = torch.Generator().manual_seed(seed + 100)
    return [able[index] for index in torch.randperm(len(able), generator=generator)[:2].tolist()]


def concentrated(
    seed: int, ranks: Mapping[str, int] | None = None, *, scale: float = SCALE
) -> "Planted":
    """Return a task whose need is a rank-24 change, of the weight's own norm, in two layers."""
    needs = dict.fromkeys(concentrated_layers(seed), CHANGE_RANK)
    return Planted(seed, needs, 1.0, ranks, scale)


def spread(seed: int, ranks: Mapping[str, int] | None = None, *, scale: float = SCALE) -> "Planted":
    """Return a task whose need is a rank-2 change in all layers, as large in total."""
    linears = _linears(bare_bert(seed=seed))
    norms = {name: float(layer.weight.detach().norm()) for name, layer in linears.items()}
    size = math.hypot(*(norms[name] for name in concentrated_layers(seed)))
    needs = dict.fromkeys(linears, SPREAD_RANK)
    return Planted(seed, needs, size / math.hypot(*norms.values()), ranks, scale)


def oracle_ranks(seed: int) -> dict[str, int]:
    """Return the ranks that fit a concentrated need: its own there, the rest evenly elsewhere."""
    linears = _linears(bare_bert(seed=seed))
    cost = {name: layer.in_features + layer.out_features for name, layer in linears.items()}
    budget = RANK * sum(cost.values())
    chosen = concentrated_layers(seed)
    ranks = {name: CHANGE_RANK if name in chosen else 1 for name in linears}
    for rank in range(2, RANK + 1):
        for name in linears:
            dearer = sum(ranks[n] * cost[n] for n in linears) + cost[name]
            if name not in chosen and dearer <= budget:
                ranks[name] = rank
    return ranks


class Planted:
    """One student and its teacher."""

    def __init__(
        self,
        seed: int,
        needs: Mapping[str, int],
        size: float,
        ranks: Mapping[str, int] | None,
        scale: float,
    ) -> None:
        """Change the layers of `needs` to these ranks, by `size` times the norm of the weight."""
        base = bare_bert(seed=seed)
        self.names = list(needs)
        self.teacher = copy.deepcopy(base).eval()
        noise = torch.Generator().manual_seed(seed)
        for name, rank in needs.items():
            weight = self.teacher.get_submodule(name).weight
            left = torch.randn(weight.shape[0], rank, generator=noise)
            change = left @ torch.randn(rank, weight.shape[1], generator=noise)
            weight.data += change * (size * weight.norm() / change.norm())
        torch.manual_seed(seed + 1)
        ranks = ranks or {}
        config = LoraConfig(
            r=RANK,
            lora_alpha=scale * RANK,
            target_modules=list(_linears(base)),
            rank_pattern=dict(ranks),
            alpha_pattern={name: scale * rank for name, rank in ranks.items()},
        )
        self.student = get_peft_model(base, config)
        self._data = torch.Generator().manual_seed(seed + 7)

    def loss(self, *, random_targets: bool = False) -> Tensor:
        """Return the mean squared error on a new batch; of pure noise if asked for."""
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=self._data)
        with torch.no_grad():
            target = self.teacher(input_ids=tokens).last_hidden_state
        if random_targets:
            target = torch.randn(target.shape, generator=self._data)
        return (self.student(input_ids=tokens).last_hidden_state - target).square().mean()

    def train(
        self,
        config: DynamicLoraConfig,
        *,
        lr: float,
        steps: int = STEPS,
        random_targets: bool = False,
        metrics: Sequence[str] = (),
    ) -> tuple[DynamicLora, float, dict[str, dict[str, float]]]:
        """Train; return the controller, the mean of the last 30 losses, and the metrics' scores."""
        optimizer = adamw(self.student, lr, weight_decay=0.0)
        schedule = LambdaLR(optimizer, lambda s: min((s + 1) / 30, 1.0) * (STEPS - s) / STEPS)
        dynamic = DynamicLora(self.student, optimizer, config)
        watching = {name: build_metric(name, seed=0) for name in metrics}
        losses: list[float] = []
        for _ in range(steps):
            loss = self.loss(random_targets=random_targets)
            loss.backward()
            dynamic.observe()
            for metric in watching.values():
                metric.observe(dynamic._layers)
            optimizer.step()
            dynamic.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        features = dynamic._analyzer.stats()
        scores = {name: m.scores(dynamic._layers, features) for name, m in watching.items()}
        return dynamic, sum(losses[-30:]) / 30, scores


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
