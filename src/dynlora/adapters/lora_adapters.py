"""Stage 5. LoRA adapters: a `RankPlan` to resized layers, optimizer state and configuration."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynlora.adapters import resize
from dynlora.adapters.layers import (
    LoraView,
    are_finite,
    find_lora_layers,
    find_root,
    in_this_step,
)
from dynlora.adapters.optimizer_state import (
    StepWatch,
    check_holds,
    drop_unfit_state,
    restart_state,
    unwrap_optimizer,
)
from dynlora.adapters.owners import OwnHook
from dynlora.adapters.patterns import changes_base
from dynlora.adapters.peft_config import own_config, untrained_modules, write_patterns
from dynlora.adapters.reducer import ReducerHook
from dynlora.adapters.strengths import (
    dropped_norm,
    enough_seen,
    in_blocks,
    lowest_ranks,
    measure_strengths,
    output_norm,
    squared_strengths,
    tokens_of,
)
from dynlora.distributed import share_from_first
from dynlora.engines.checks import check_devices, check_engine, keep_gradients
from dynlora.engines.compiled import follow_ranks
from dynlora.engines.deepspeed import (
    AnyOptimizer,
    step_parameters_apart,
    trained_by,
    unpartitioned,
)
from dynlora.engines.fsdp import reshard
from dynlora.errors import LayerError, check_finite
from dynlora.types import BasisChange, FeatureStats, RankPlan

logger = logging.getLogger(__name__)


class LoraAdapters:
    """LoRA layers of one adapter, and the optimizer that trains them."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        adapter_name: str | None,
        *,
        follow: Callable[[BasisChange], None],
        compiled: bool = False,
    ) -> None:
        """Find the layers, and check that they and the optimizer state can be resized.

        `follow` receives each applied change, with zero maps after a load of another rank.
        `compiled` tells whether `torch.compile` wraps the model or a part of it.
        """
        check_engine(model)
        keep_gradients(model)
        reshard(model)
        layers = find_lora_layers(model, adapter_name)
        self._adapter, (self._root, self._configs) = layers[0].adapter, find_root(model)
        own = own_config(self._configs, self._adapter)
        if changes_base(own.init_lora_weights):
            raise LayerError(
                "LoRA layers must leave their base weights as they are, got `init_lora_weights` "
                f"{own.init_lora_weights!r}, with which PEFT changes them again when it loads what "
                "was saved, by an amount that depends on the ranks: begin with another start; or "
                "save the base model as it is now, load that, and add a new adapter."
            )
        self._model = model
        self.layers: dict[str, LoraView] = {layer.name: layer for layer in layers}
        self._follow = follow
        self._optimizer = unwrap_optimizer(optimizer)
        self._gradient_state = getattr(optimizer, "gradient_state", None)
        check_devices([parameter for layer in layers for parameter in layer.parameters])
        check_holds(self._optimizer, _trained_parameters(layers))
        if missing := untrained_modules(own, self._root, trained_by(self._optimizer)):
            logger.warning(
                "`LoraConfig` names %s, of which nothing is trained: check these names, and that "
                "the optimizer has parameters of them with requires_grad=True",
                ", ".join(missing),
            )
        self._drop_unfit_state(layers)
        self._told = {layer.name: layer.r for layer in layers}  # ranks last reported to `follow`
        self._reducer_hook = ReducerHook(model, compiled=compiled)
        self._handles: list[RemovableHandle] = []
        self.step_watch = StepWatch(self._optimizer, layers)
        """Checks that the given optimizer takes the steps."""
        self.peak_parameters = self.parameters
        """Largest number of LoRA parameters so far."""

    @property
    def parameters(self) -> int:
        """Number of LoRA parameters."""
        return sum(layer.r * layer.cost for layer in self.layers.values())

    @property
    def device(self) -> torch.device:
        """Device on which all LoRA parameters are read."""
        return next(iter(self.layers.values())).parameters[0].device

    @property
    def is_accumulating(self) -> bool:
        """Whether Accelerate skips this batch's optimizer step to accumulate gradients."""
        return self._gradient_state is not None and not self._gradient_state.sync_gradients

    @property
    def configured_rank(self) -> int:
        """`LoraConfig.r`."""
        return int(self._configs[self._adapter].r)

    @property
    def budget(self) -> int:
        """Parameters at rank `LoraConfig.r`, or the present ones if a `rank_pattern` has more."""
        at_r = sum(self.configured_rank * layer.cost for layer in self.layers.values())
        return max(at_r, self.parameters)

    def open(self) -> None:
        """Install hooks that drop unfit moments and report ranks when weights are loaded."""
        step_parameters_apart(self._optimizer)
        # DeepSpeed loads moments itself, and only if shapes match.
        if self._handles or not isinstance(self._optimizer, Optimizer):
            return
        layers = list(self.layers.values())
        alive = ref(self)  # the model must not keep the optimizer alive

        def fit(*_: Any) -> None:
            adapters = alive()
            if adapters is not None and layers[0].is_there:
                adapters._drop_unfit_state(layers)
                adapters._tell_loaded()

        root: Any = self._root
        self._handles = [
            self._optimizer.register_load_state_dict_post_hook(
                lambda _: self._drop_unfit_state(layers)
            ),
            root.register_load_state_dict_post_hook(OwnHook(fit)),
        ]
        self._reducer_hook.open()  # ranks may have changed before, without this controller

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def model_has_gradients(self) -> bool:
        """Whether any parameter of the model has a gradient."""
        return any(parameter.grad is not None for parameter in self._model.parameters())

    def with_gradients(self) -> list[LoraView]:
        """Return the layers with gradients in this step, read once; fail on a deleted adapter."""
        self._check_there()
        layers = [layer for layer in self.layers.values() if layer.has_gradients]
        return in_this_step(layers) if layers else []

    def check(self, step: int) -> None:
        """Check that ranks can change after `step`.

        Raises:
            LayerError: If the adapter is merged or was deleted.
            NonFiniteError: If a weight is not finite.
            OptimizerError: If a different optimizer took the step.
        """
        reshard(self._model)  # free copies that FSDP2 keeps after an evaluation
        self._check_there()
        layers = list(self.layers.values())
        for layer in layers:
            if layer.module.merged:  # once resized, it could not be unmerged
                raise LayerError(
                    f"LoRA layers must not be merged where ranks may move, got {layer.name!r} "
                    "merged into its base weight: call `model.unmerge_adapter()` before."
                )
        self.step_watch.end()
        finite = are_finite([(layer.lora_A, layer.lora_B) for layer in layers]).tolist()
        broken = [layer.name for layer, ok in zip(layers, finite, strict=True) if not ok]
        check_finite(broken, "weights", step=step, layers=len(layers))

    def _check_there(self) -> None:
        layer = next(iter(self.layers.values()))
        if not layer.is_there:
            raise LayerError(
                f"Adapter {layer.adapter!r} must stay in the model while its ranks may move, and "
                "was deleted: call `close()` on the `DynamicLora` before `delete_adapter`."
            )

    def lowest_ranks(
        self, names: Sequence[str], features: Mapping[str, FeatureStats], *, tolerance: float
    ) -> dict[str, int]:
        """Return the lowest rank per layer whose relative output error is within the tolerance."""
        squares, tolerated = [], []
        for layers in in_blocks(self.layers[name] for name in names):
            stats = enough_seen(layers, features)
            squares += squared_strengths(layers, [tokens_of(found) for found in stats])
            tolerated += [tolerance * norm for norm in map(output_norm, layers, stats)]
        return dict(zip(names, lowest_ranks(squares, tolerated), strict=True))

    def energies(self, features: Mapping[str, FeatureStats]) -> dict[str, list[float]]:
        """Return the squared strength of each layer's directions by name, strongest first."""
        found = {}
        for layers in in_blocks(self.layers.values()):
            tokens = [tokens_of(stats) for stats in enough_seen(layers, features)]
            for layer, squares in zip(layers, squared_strengths(layers, tokens), strict=True):
                found[layer.name] = squares.tolist()
        return found

    @contextmanager
    def cut(self, ranks: Mapping[str, int], features: Mapping[str, FeatureStats]) -> Iterator[None]:
        """Drop each layer's weakest directions within the context, without a change of shapes."""
        shrinking = [layer for name, layer in self.layers.items() if ranks[name] < layer.r]
        before = [layer.lora_B.detach().clone() for layer in shrinking]
        try:
            for layers in in_blocks(shrinking):
                tokens = [tokens_of(found) for found in enough_seen(layers, features)]
                kept = [ranks[layer.name] for layer in layers]
                changes = resize.shrink_changes(layers, measure_strengths(layers, tokens), kept)
                for layer, change in zip(layers, changes, strict=True):
                    B = layer.lora_B.detach().double() @ change.to_B @ change.to_A
                    resize.set_matrix(layer.factor_B, B)
            yield
        finally:
            for layer, B in zip(shrinking, before, strict=True):
                resize.set_matrix(layer.factor_B, B)

    def apply(
        self, plan: RankPlan, features: Mapping[str, FeatureStats], *, seed: int
    ) -> dict[str, float]:
        """Resize layers to their planned ranks, shrinking first to never exceed the budget.

        Returns the norm of each dropped output, relative to the norm of the layer's output.
        """
        planned = [(self.layers[name], rank) for name, rank in plan.ranks.items()]
        shrinking = [layer for layer, rank in planned if rank < layer.r]
        growing = [layer for layer, rank in planned if rank > layer.r]
        lost = dict.fromkeys(plan.ranks, 0.0)
        # Two plans of one step draw other rows. Reduce any integer to the range of torch's seeds.
        drawn_from = ((seed * 1_000_003 + plan.step) * 1_000_003 + self.parameters) % 2**63
        generator = torch.Generator("cpu").manual_seed(drawn_from)
        if not shrinking and not growing:
            return lost
        try:
            with unpartitioned(self._optimizer):
                for some in in_blocks(shrinking):
                    lost |= self._shrink(some, plan.ranks, features)
                for some in in_blocks(growing):
                    self._grow(some, plan.ranks, features, generator)
        finally:  # the caller may continue after an out-of-memory error
            self.write_config()
        return lost

    def _shrink(
        self,
        layers: Sequence[LoraView],
        ranks: Mapping[str, int],
        features: Mapping[str, FeatureStats],
    ) -> dict[str, float]:
        stats = enough_seen(layers, features)
        strengths = measure_strengths(layers, [tokens_of(found) for found in stats])
        kept = [ranks[layer.name] for layer in layers]
        dropped = [dropped_norm(found, rank) for found, rank in zip(strengths, kept, strict=True)]
        norms = list(map(output_norm, layers, stats))
        self._change(resize.shrink_changes(layers, strengths, kept))
        values = torch.stack(dropped).tolist()
        parts = zip(layers, values, norms, strict=True)
        return {layer.name: value / norm for layer, value, norm in parts}

    def _grow(
        self,
        layers: Sequence[LoraView],
        ranks: Mapping[str, int],
        features: Mapping[str, FeatureStats],
        generator: torch.Generator,
    ) -> None:
        rows = resize.new_rows(
            layers,
            [ranks[layer.name] - layer.r for layer in layers],
            [tokens_of(features.get(layer.name)) for layer in layers],
            generator=generator,
        )
        self._change([resize.grow_change(layer, ranks[layer.name]) for layer in layers], rows)
        # Layers shrink first, so that only growth can raise the peak.
        self.peak_parameters = max(self.peak_parameters, self.parameters)

    def order(self, features: Mapping[str, FeatureStats]) -> None:
        """Order every layer's components by strength, strongest first; outputs are unchanged."""
        with unpartitioned(self._optimizer):
            for layers in in_blocks(self.layers.values()):
                tokens = [tokens_of(found) for found in enough_seen(layers, features)]
                strengths = measure_strengths(layers, tokens)
                self._change(list(map(resize.reorder_change, layers, strengths)))

    def apply_weights(self, weights: Mapping[str, float]) -> None:
        """Set scalings to `unit_scaling` times the weight, and rescale `lora_B` to keep outputs.

        Scalings are rounded to float32, so that ``lora_alpha / r`` reproduces them exactly.
        """
        with unpartitioned(self._optimizer):
            for name, weight in weights.items():
                layer = self.layers[name]
                unit = layer.unit_scaling
                rounded = float(torch.tensor(unit * weight, dtype=torch.float32))
                target = unit if weight == 1 else rounded
                if target != layer.scaling:
                    # `follow` is not called, because metrics read gradients without the weight.
                    resize.apply_change(
                        layer, self._optimizer, resize.scale_change(layer, target / layer.scaling)
                    )
                    layer.set_fields(r=layer.r, scaling=target)
                    layer.set_unit_scaling(unit)
        self.write_config()

    def _drop_unfit_state(self, layers: Sequence[LoraView]) -> None:
        parameters = [parameter for layer in layers for parameter in layer.parameters]
        if forgotten := drop_unfit_state(self._optimizer, parameters):
            logger.info(
                "the moments of %d parameters are of other ranks: they start anew", forgotten
            )

    def _change(self, changes: Sequence[BasisChange], rows: Sequence[Tensor] = ()) -> None:
        """Apply changes, each with its new rows of `lora_A`."""
        maps = [matrix for change in changes for matrix in (change.to_A, change.to_B)]
        share_from_first([*maps, *rows])
        growth: Sequence[Tensor | None] = rows or [None] * len(changes)
        for change, grown in zip(changes, growth, strict=True):
            resize.apply_change(self.layers[change.name], self._optimizer, change, grown)
            self._tell(change)

    def _tell(self, change: BasisChange) -> None:
        self._follow(change)
        layer = self.layers[change.name]
        self._told[change.name] = layer.r
        self._reducer_hook.open()

    def _tell_loaded(self) -> None:
        for name, layer in self.layers.items():
            old, new = self._told[name], layer.r
            if old != new:
                restart_state(self._optimizer, layer.parameters)
                none = torch.zeros(new, old, dtype=torch.float64, device=self.device)
                self._tell(BasisChange(name=name, to_A=none, to_B=none.T))

    def write_config(self) -> None:
        """Write ranks and scalings to PEFT's configuration, and let compiled code follow."""
        follow_ranks(self._model)
        write_patterns(self._configs[self._adapter], list(self.layers.values()))

    def shapes(self) -> dict[str, dict[str, float]]:
        """Return rank, scaling and unweighted scaling by module name, for a checkpoint."""
        return {
            name: {"r": layer.r, "scaling": layer.scaling, "unit": layer.unit_scaling}
            for name, layer in self.layers.items()
        }

    def load_shapes(self, shapes: Mapping[str, Mapping[str, float]]) -> None:
        """Set a checkpoint's ranks before its tensors; resized layers get zeros and no moments."""
        reshard(self._model)
        with unpartitioned(self._optimizer):
            for name, shape in shapes.items():
                layer = self.layers[name]
                resize.set_rank(layer, int(shape["r"]))
                layer.set_fields(r=int(shape["r"]), scaling=shape["scaling"])
                layer.set_unit_scaling(shape["unit"])
                self._drop_unfit_state([layer])
            self._tell_loaded()
        self.peak_parameters = max(self.peak_parameters, self.parameters)
        self.write_config()


def _trained_parameters(layers: Sequence[LoraView]) -> list[Parameter]:
    parameters = [p for layer in layers if layer.is_trained for p in layer.parameters]
    if not parameters:
        raise LayerError(
            f"At least one of {len(layers)} LoRA layers must be trained, lora_A and lora_B both, "
            "got none with requires_grad=True: load the adapter with `is_trainable=True`, or make "
            "it the active one with `set_adapter`."
        )
    return parameters
