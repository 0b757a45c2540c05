"""What must be true after every operation: stock PEFT's outputs and gradients, and the invariants.

Each check raises an `AssertionError` whose message begins with the promise that is broken.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.optim import Optimizer

from dynlora import DynamicLora
from dynlora.history import Event
from tests.stateful.models import Settings, add_other, exactly
from tests.stateful.wirings import lora_layers

Tensors = dict[str, Tensor]
Action = Callable[[PeftModel], Tensors]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def weights(model: PeftModel) -> Tensors:
    """Return copies of the adapters' weights by name, as they would be saved."""
    return {n: w.detach().clone() for n, w in model.state_dict().items() if ".lora_" in n}


def saved_ranks(model: PeftModel) -> dict[str, int]:
    """Return the ranks of the adapter 'default', as the shapes of saved weights tell them."""
    state, place = model.state_dict(), "base_model.model.{}.lora_A.default.weight"
    return {name: len(state[place.format(name)]) for name in lora_layers(model)}


def gradients(model: PeftModel) -> Tensors:
    return {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


class Reference:
    """Stock PEFT with the same weights: built of a configuration, and never attached to."""

    def __init__(self, settings: Settings, scalings: Mapping[str, float]):
        self._settings, self._scalings = settings, scalings
        self._model: PeftModel | None = None
        self._made_for: object = None

    def of(self, live: PeftModel) -> PeftModel:
        """Return a model of the live one's ranks, weights and adapters."""
        merged = any(layer.merged for layer in lora_layers(live).values())
        made_for = saved_ranks(live), "other" in live.peft_config, merged
        if made_for != self._made_for or merged:  # merging changes base weights, by rounding too
            self._model, self._made_for = self._build(*made_for[:2]), made_for
        assert self._model is not None
        found = self._model.load_state_dict(weights(live), strict=False)
        assert not found.unexpected_keys, f"stock PEFT knows all weights: {found.unexpected_keys}"
        self._model.set_adapter(live.active_adapter)
        self._model.zero_grad()
        if merged:
            self._model.merge_adapter()
        return self._model.train(live.training)

    def _build(self, ranks: Mapping[str, int], has_other: bool) -> PeftModel:
        power = 0.5 if self._settings.rslora else 1
        config = self._settings.lora(
            init_lora_weights=True,
            rank_pattern={exactly(n): r for n, r in ranks.items()},
            alpha_pattern={exactly(n): self._scalings[n] * r**power for n, r in ranks.items()},
        )
        model = get_peft_model(self._settings.base(), config)
        if has_other:
            add_other(model, self._settings)
        return model

    def check(self, live: PeftModel, action: Action, promise: str) -> None:
        """Check that an action returns, or raises, the same with the live model and with PEFT's."""
        stock = self.of(live)
        got, expected = outcome(live, action), outcome(stock, action)
        if isinstance(got, RuntimeError) or isinstance(expected, RuntimeError):
            assert type(got) is type(expected), f"{promise}: got {got!r}, PEFT {expected!r}"
            return
        alone = sorted(got.keys() ^ expected.keys())
        assert not alone, f"{promise}: only one of both has {alone}"
        sizes: dict[str, float] = {}
        for name, value in expected.items():
            kind = name.split()[0]
            sizes[kind] = max(sizes.get(kind, 1e-3), float(value.detach().abs().max()))
        for name, value in expected.items():
            found, corner = got[name].detach().clone(), tuple(map(slice, value.shape))
            found[corner] -= value.detach()  # tensors that are held wider are zero beyond
            error = float(found.abs().max()) / sizes[name.split()[0]]
            assert error <= self._settings.accuracy or (
                self._settings.dtype == "autocast"
                and is_nearer(got[name][corner], value, unrounded(stock, action)[name])
            ), f"{promise}: {name} is off by {error:.2g}"


def unrounded(model: PeftModel, action: Action) -> Tensors:
    """Return what an action returns with a model without autocast."""
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        return action(model)


def is_nearer(value: Tensor, other: Tensor, exact: Tensor) -> bool:
    """Return whether a value is nearer to the exact one than another is."""
    return bool((value - exact).abs().max() <= (other - exact).abs().max())


def outcome(model: PeftModel, action: Action) -> Tensors | RuntimeError:
    try:
        return action(model)
    except RuntimeError as error:
        return error


def check_one_truth(
    model: PeftModel, optimizer: Optimizer, scalings: Mapping[str, float], held: list[list[int]]
) -> None:
    """Check that fields, tensors, exported patterns and moments tell one rank and one scale."""
    saved, config = saved_ranks(model), model.peft_config["default"]
    assert identities(optimizer) == held, "parameters stay the same objects in their groups"
    for name, layer in lora_layers(model).items():
        r, A, B = layer.r["default"], layer.lora_A["default"], layer.lora_B["default"]
        exported = [v for key, v in config.rank_pattern.items() if re.match(key, name)]
        told = r, saved[name], *(exported or [config.r])
        assert len(set(told)) == 1, f"layer, tensors and export tell one rank: {name} {told}"
        assert len(A.weight) == B.weight.shape[1] == r >= 1, f"both factors fit: {name}"
        change = abs(layer.scaling["default"] / scalings[name] - 1)
        assert change < 1e-12, f"a rank change never changes the scale: {name}"
        for weight in (A.weight, B.weight):
            state = optimizer.state.get(weight, {})
            shapes = {state[key].shape for key in MOMENTS if state.get(key) is not None}
            assert shapes <= {weight.shape}, f"moments have their parameter's shape: {name}"


def identities(optimizer: Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def check_budget(dynamic: DynamicLora, model: PeftModel, budget: int) -> None:
    """Check the live parameters against a budget that was counted by hand."""
    spent, end = parameters(model, saved_ranks(model)), dynamic.config.budget_end or 1
    least = round(end * budget)
    assert least <= dynamic.budget <= budget, f"{least} <= {dynamic.budget} <= {budget}"
    assert spent == dynamic.parameters, "the parameters reported are the live ones"
    assert spent <= dynamic.budget, f"the budget in force is met: {spent} > {dynamic.budget}"
    peak = max(spent, dynamic.peak_parameters)
    assert peak <= budget, f"parameters never exceed the budget: {peak} > {budget}"


def parameters(model: PeftModel, ranks: Mapping[str, int]) -> int:
    layers = lora_layers(model)
    return sum(r * (layers[n].in_features + layers[n].out_features) for n, r in ranks.items())


def check_event(event: Event, dynamic: DynamicLora, reached: Set[str]) -> None:
    """Check one event against what gradients have shown since the run began.

    Args:
        event: An event at which all layers were trained.
        dynamic: Its configuration is read.
        reached: Layers that had a gradient in at least one observed step.
    """
    layers, pinned = event.layers, dynamic.config.pinned
    moved = {n: (x.rank_before, x.rank_after) for n, x in layers.items()}
    scores = [x.score for n, x in layers.items() if n in reached and x.score is not None]
    informative = max(scores, default=0) > min(scores, default=0) * (1 + 1e-6)
    silent = not scores or (not informative and reached >= layers.keys())
    for name, (before, after) in moved.items():
        if name in pinned:
            assert before == after, f"a pinned layer's rank stays: {name} in {moved}"
        elif silent and dynamic.config.budget_end is None:
            assert after >= before, f"without evidence no rank shrinks: {name} in {moved}"
        elif informative and name not in reached and not layers[name].waits:
            assert after <= dynamic.config.min_rank, (
                f"a layer without any gradient goes to the minimum rank: {name} in {moved}"
            )


def hooks_of(model: PeftModel, optimizer: Optimizer) -> Counter[str]:
    """Count the hooks, by the name of their holder and their kind, and the forwards put in."""
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    kinds += ["_state_dict_hooks", "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks"]
    holders = {name: (vars(module), kinds) for name, module in model.named_modules()}
    holders["optimizer"] = vars(optimizer), [n for n in vars(optimizer) if n.endswith("_hooks")]
    found = Counter({f"{n}.{k}": len(v[k]) for n, (v, kinds) in holders.items() for k in kinds})
    return found + Counter(f"{n}.forward" for n, (own, _) in holders.items() if "forward" in own)


def check_let_go(found: Counter[str], before: Counter[str]) -> None:
    """Check that nothing of a closed controller is left; copies come with hooks of no effect."""
    left = [n for n in found if found[n] > before[n] or n.endswith(".forward")]
    assert not left, f"nothing is left after close: {left}"
