"""Planted needs: a teacher is the student's base plus a high-rank change in 2 of its 24 layers.

The student, with LoRA of low rank on all 24, learns the teacher's hidden states. Only the two
changed layers need rank; where a method puts its budget can be told from the outside.
"""

import copy
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.importance import build_metric
from tests.models import bare_bert

RANK = 4
CHANGE_RANK = 24
STEPS = 600
BATCH, LENGTH, VOCABULARY = 16, 16, 64


class Planted:
    """One student and its teacher; the layers changed are drawn by the seed.

    Queries and keys are left alone: attention in a random model hardly depends on them, so that a
    change there is no need that could be found.
    """

    def __init__(self, seed: int) -> None:
        base = bare_bert(seed=seed)
        linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
        able = [n for n in linears if "query" not in n and "key" not in n]
        generator = torch.Generator().manual_seed(seed + 100)
        chosen = torch.randperm(len(able), generator=generator)[:2].tolist()
        self.names = [able[index] for index in chosen]
        self.teacher = copy.deepcopy(base).eval()
        noise = torch.Generator().manual_seed(seed)
        for name in self.names:
            weight = self.teacher.get_submodule(name).weight
            left = torch.randn(weight.shape[0], CHANGE_RANK, generator=noise)
            change = left @ torch.randn(CHANGE_RANK, weight.shape[1], generator=noise)
            weight.data += change * (weight.norm() / change.norm())
        torch.manual_seed(seed + 1)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(linears))
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
        optimizer = AdamW([p for p in self.student.parameters() if p.requires_grad], lr=lr)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
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
