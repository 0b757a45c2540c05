"""The settings of one sequence of operations, and the models and optimizers made of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from dynlora import DynamicLora, DynamicLoraConfig
from tests.stateful.wirings import WIRINGS, Tiny

OPTIMIZERS = {
    "adamw": AdamW,
    "amsgrad": lambda groups: Adam(groups, amsgrad=True),
    "sgd": lambda groups: SGD(groups, momentum=0.9),
    "adafactor": Adafactor,
}
GROUPS = {
    "one": lambda name: "",
    "factors": lambda name: "A" if "lora_A" in name else "B",
    "layers": lambda name: name.split(".lora_")[0],
}
WINDOWS = [(0.1, 0.9, 5), (0.3, 0.6, 3), (0.4, 1.0, 2), (0.05, 0.1, 1)]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that does not change in one sequence; all combinations are allowed."""

    wiring: str
    width: int
    tied: bool
    """Whether q and k share their base weight."""
    dtype: str
    start: bool | str
    dropout: float
    rslora: bool
    uneven: Mapping[int, int]
    """Ranks that the adapter comes with, by the number of the layer."""
    begun: bool
    """Whether `lora_B` begins with random values."""
    skips: str
    """When q and left are skipped, if they carry an adapter."""
    optimizer: str
    groups: str
    window: tuple[float, float, int]
    importance: str
    fused: bool
    tolerance: float
    """`shrink_tolerance`."""
    pins: bool
    falls: bool
    """Whether the budget falls, unless a layer is pinned."""
    checkpointing: str
    probes: bool
    """Whether the model is compared with PEFT's after every operation, not only in forwards."""

    @property
    def names(self) -> tuple[str, ...]:
        """Layers that carry an adapter."""
        return WIRINGS[self.wiring].lora

    @property
    def budget_end(self) -> float | None:
        """Part of the budget that is left at the end."""
        return 0.6 if self.falls and not self.pins else None

    @property
    def accuracy(self) -> float:
        """Largest difference from PEFT, relative to the largest value."""
        return {"float64": 1e-9, "float32": 2e-5, "autocast": 0.25}[self.dtype]

    @property
    def needs_inputs_kept(self) -> bool:
        """Whether the backward pass needs inputs unchanged, of which PEFT would keep a copy."""
        return self.fused and self.dtype == "autocast"

    def base(self) -> Tiny:
        base = WIRINGS[self.wiring](self.width)
        if self.tied and {"q", "k"} <= set(base.layers):
            base.k.weight = base.q.weight
        base.checkpointing = self.checkpointing
        return base.double() if self.dtype == "float64" else base

    def lora(self, **changes: object) -> LoraConfig:
        return LoraConfig(
            **{
                "r": 2 if self.start == "orthogonal" else 3,  # such matrices need an even rank
                "lora_alpha": 5,
                "target_modules": list(self.names),
                "lora_dropout": self.dropout,
                "use_rslora": self.rslora,
                "init_lora_weights": self.start,
                "rank_pattern": {exactly(self.names[i]): r for i, r in self.uneven.items()},
            }
            | changes
        )

    def model(self) -> PeftModel:
        model = get_peft_model(self.base(), self.lora()).train()
        generator = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if self.begun and "lora_B" in name:
                weight.data = 0.3 * torch.randn(weight.shape, generator=generator).to(weight)
        return model

    def new_optimizer(self, model: PeftModel) -> Optimizer:
        """Return an optimizer of the adapter 'default'."""
        groups: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if ".default." in name:
                groups.setdefault(GROUPS[self.groups](name), []).append(parameter)
        rate = 1e-3 if self.optimizer == "sgd" else 0.02
        settings = [
            {"params": parameters, "lr": rate * (2 if name == "B" else 1)}
            for name, parameters in groups.items()
        ]
        return OPTIMIZERS[self.optimizer](settings)

    def attach(self, model: PeftModel, optimizer: Optimizer) -> DynamicLora:
        first, last, events = self.window
        config = DynamicLoraConfig(
            total_steps=30,
            first_event=first,
            last_event=last,
            events=events,
            importance=self.importance,
            fused=self.fused,
            hysteresis=0.25 if self.begun else 0,
            shrink_tolerance=self.tolerance,
            budget_end=self.budget_end,
            pinned=self.names[1:2] if self.pins else (),
        )
        return DynamicLora(model, optimizer, config)


def exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def add_other(model: PeftModel, settings: Settings) -> None:
    """Add a second adapter, of another rank and scale, that is not active."""
    torch.default_generator.manual_seed(5)
    names, active = list(settings.names), model.active_adapter
    config = LoraConfig(r=2, lora_alpha=6, target_modules=names, init_lora_weights=False)
    model.add_adapter("other", config)
    model.set_adapter(active)


SETTINGS = st.builds(
    Settings,
    wiring=st.sampled_from(sorted(WIRINGS)),
    width=st.sampled_from([8, 12]),
    tied=st.booleans(),
    dtype=st.sampled_from(["float64", "float32", "autocast"]),
    start=st.sampled_from([True, "gaussian", "orthogonal"]),
    dropout=st.sampled_from([0.0, 0.0, 0.25]),
    rslora=st.booleans(),
    uneven=st.sampled_from([{}, {0: 6}, {1: 2, 2: 4}]),
    begun=st.booleans(),
    skips=st.sampled_from(["never", "sometimes", "always"]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    groups=st.sampled_from(sorted(GROUPS)),
    window=st.sampled_from(WINDOWS),
    importance=st.sampled_from(["signal", "gradient_norm", "sensitivity"]),
    fused=st.sampled_from([True, True, False]),
    tolerance=st.sampled_from([0.05, 1.0]),
    pins=st.booleans(),
    falls=st.booleans(),
    checkpointing=st.sampled_from(["off", "off", "reentrant", "not reentrant"]),
    probes=st.booleans(),
)
