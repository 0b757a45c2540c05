"""`DynamicLoraCallback`: the controller's two calls inside `transformers.Trainer`.

`Trainer` calls `observe()` after clipping gradients, and `step()` after the optimizer's step. Under
DeepSpeed, whose backward pass steps the optimizer, `observe()` runs at the start of that step.
"""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args
from transformers.trainer import TRAINER_STATE_NAME

from dynlora.adapters.extension import Extension
from dynlora.adapters.layers import find_lora_layers
from dynlora.adapters.optimizer_state import unwrap_optimizer
from dynlora.adapters.peft_config import ShapeHooks
from dynlora.adapters.resize import set_rank
from dynlora.budget_search import Validate
from dynlora.config import DynamicLoraConfig
from dynlora.controller import DynamicLora, check_same_layers
from dynlora.engines.deepspeed import call_before_step
from dynlora.errors import EngineError, ResumeError
from dynlora.history import conclusion, describe, stillness
from dynlora.input_adaptive.file import save_input_adaptive
from dynlora.integrations.checkpoint import VALUES, load_state, save_state

logger = logging.getLogger(__name__)


class DynamicLoraCallback(TrainerCallback):
    """Changes LoRA ranks during a `Trainer`'s training, and resumes from its checkpoints.

    Examples:
        >>> trainer = Trainer(model, args, callbacks=[DynamicLoraCallback(DynamicLoraConfig())])
    """

    def __init__(
        self,
        config: DynamicLoraConfig | None = None,
        *,
        adapter_name: str | None = None,
        resume_from: str | Path | None = None,
        validate: Validate | None = None,
        extensions: Sequence[Extension] = (),
    ) -> None:
        """Prepare a callback for one trainer.

        Args:
            config: Settings; None for the defaults. If `total_steps` is None, the trainer's number
                of steps is used.
            adapter_name: The adapter to resize; None for the active one.
            resume_from: Checkpoint folder passed to `Trainer.train(resume_from_checkpoint=...)`,
                whose ranks the model gets at once; required only if it is outside the trainer's
                `output_dir`, and under FSDP2 and DeepSpeed, which shard the model before loading.
            validate: Returns the validation loss, for `budget_end="auto"`; with the trainer's own:
                ``lambda: trainer.evaluate(metric_key_prefix="tried")["tried_loss"]``.
            extensions: Extensions of the controller (see `DynamicLora`).
        """
        self.config = config or DynamicLoraConfig()
        self.validate = validate
        """Returns the validation loss; read when training begins."""
        self.dynamic: DynamicLora | None = None
        """The controller; None before training begins."""
        self._adapter_name = adapter_name
        self._extensions = extensions
        self._resume_from = None if resume_from is None else Path(resume_from)
        self._shape_hooks: ShapeHooks | None = None
        self._watched: list[tuple[nn.Module, str]] = []  # modules and keys of the hooked factors
        self._observing = ExitStack()

    def on_init_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Check the arguments, and prepare the model.

        Raises:
            EngineError: If the arguments require an unsupported engine.
            LayerError: If the model has no LoRA layer, or one that cannot be resized.
            ResumeError: If `resume_from` is missing or damaged.
        """
        _check_arguments(args)
        self.prepare(kwargs["model"])

    def prepare(self, model: nn.Module) -> nn.Module:
        """Allow loading checkpoints with other ranks into a model, and return the model.

        To resume, call this on the model that `Trainer(model_init=...)` returns, and before
        `trainer.add_callback`.

        Raises:
            LayerError: If the model has no LoRA layer, or one that cannot be resized.
            ResumeError: If `resume_from` is missing or damaged, or belongs to another model.
        """
        self._watch_loads(model)
        if self._resume_from is not None:
            shapes = load_state(self._resume_from)["layers"]
            layers = find_lora_layers(model, self._adapter_name)
            check_same_layers(shapes, [layer.name for layer in layers])
            for layer in layers:
                set_rank(layer, int(shapes[layer.name]["r"]))
        return model

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Attach to model and optimizer, and restore the checkpoint's state if training resumes.

        Raises:
            ResumeError: If the checkpoint's state is missing, or belongs to another model or
                configuration; or if training starts from step 0 with `resume_from`.
        """
        if self._resume_from is not None and state.global_step == 0:
            raise ResumeError(
                f"With `resume_from`, training must resume from {self._resume_from}, but it starts "
                "from step 0: call `trainer.train(resume_from_checkpoint=...)`."
            )
        config = self.config
        if config.total_steps is None:
            config = replace(config, total_steps=state.max_steps)
        model: nn.Module = kwargs["model"]
        self._watch_loads(model)
        self._observing.close()
        if self.dynamic is not None:
            self.dynamic.close()
        if args.torch_compile:  # the Trainer passes the model without its compiled wrapper
            model = cast(nn.Module, torch.compile(model, backend="eager"))
        self.dynamic = DynamicLora(
            model,
            kwargs["optimizer"],
            config,
            adapter_name=self._adapter_name,
            validate=self.validate,
            extensions=self._extensions,
        )
        if args.deepspeed_plugin is not None:
            # Accelerate's backward steps the engine before any callback of the trainer.
            optimizer = unwrap_optimizer(kwargs["optimizer"])
            self._observing.callback(call_before_step(optimizer, self.dynamic.observe))
        if state.global_step > 0:
            self._resume(self._checkpoint(args, state), state)

    def on_pre_optimizer_step(
        self, args: Args, state: State, control: Control, **kwargs: Any
    ) -> None:
        """Read the gradients, except under DeepSpeed, which has already stepped."""
        assert self.dynamic is not None
        if args.deepspeed_plugin is None:
            self.dynamic.observe()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Count the step, change ranks at an event, and print what the log does not show."""
        assert self.dynamic is not None
        due = vars(control).copy()  # the trainer clears some of it when `validate` evaluates
        told = len(self.dynamic.history)
        self.dynamic.step()
        vars(control).update(due)
        for event in self.dynamic.history[told:]:
            _print(f"step {event.step}: {describe(event)}", state)

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Write the controller's state into the checkpoint folder."""
        assert self.dynamic is not None
        dynamic_state = self.dynamic.state_dict()  # a collective: joins the processes' samples
        if not args.should_save:
            return
        folder = _written_checkpoint(args, state)
        save_state(folder, dynamic_state)
        if self.dynamic.input_adaptive is not None:
            save_input_adaptive(self.dynamic.input_adaptive, folder)

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Remove the hooks; with `load_best_model_at_end`, load the best checkpoint's scales.

        The trainer has already loaded its tensors and thus its ranks. Input-adaptive ranks stay on
        until `close()`, as in earlier evaluations.
        """
        assert self.dynamic is not None
        self._observing.close()
        if self.dynamic.input_adaptive is None:
            self.dynamic.close()
        else:
            self.dynamic.freeze()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            layers = find_lora_layers(kwargs["model"], self._adapter_name)
            self._take_best(Path(state.best_model_checkpoint), layers[0].adapter)
        if (why := stillness(self.dynamic.history)) is None:
            _print(conclusion(self.dynamic.history), state)
        elif not self.dynamic.history:  # other reasons were told at the last event
            logger.warning("no rank moved: %s", why)

    def _take_best(self, checkpoint: Path, adapter: str) -> None:
        """Load a checkpoint's scales if the trainer has loaded its tensors, else log a warning."""
        assert self.dynamic is not None
        if (checkpoint / adapter).is_dir():  # PEFT's folder for adapters not named "default"
            logger.warning(
                "the Trainer does not find adapter %r in its best checkpoint: load it from %s",
                adapter,
                checkpoint / adapter,
            )
            return
        try:
            best = load_state(checkpoint)
        except ResumeError as error:  # for example on another machine than the writer's
            logger.warning("the best checkpoint was not loaded, the last weights stay: %s", error)
            return
        self.dynamic.take_shapes(best)

    def close(self) -> None:
        """Remove every hook that this callback installed."""
        self._observing.close()
        if self.dynamic is not None:
            self.dynamic.close()
        if self._shape_hooks is not None:
            self._shape_hooks.close()
            self._shape_hooks, self._watched = None, []

    def _watch_loads(self, model: nn.Module) -> None:
        layers = find_lora_layers(model, self._adapter_name)
        holders = [(layer.factor_A.holder, layer.factor_A.key) for layer in layers]
        if holders == self._watched:
            return
        # Existing hooks are on another adapter, or an earlier model of `Trainer(model_init=...)`.
        if self._shape_hooks is not None:
            self._shape_hooks.close()
        self._shape_hooks, self._watched = ShapeHooks(model, layers), holders

    def _resume(self, folder: Path, state: State) -> None:
        """Restore a checkpoint's state after checking that it is of the trainer's run and step."""
        assert self.dynamic is not None
        dynamic_state, step = load_state(folder), state.global_step
        if dynamic_state["step"] != step:
            raise ResumeError(
                f"The state in {folder} must be of step {step}, at which the trainer resumes, got "
                f"step {dynamic_state['step']}: give that checkpoint's folder as "
                "`DynamicLoraCallback(resume_from=...)`, or leave it out."
            )
        if (path := folder / TRAINER_STATE_NAME).is_file():
            logged = State.load_from_json(str(path)).log_history
            if json.dumps(logged) != json.dumps(state.log_history):  # NaN is NaN here
                raise ResumeError(
                    f"The state in {folder} must be of the run that the trainer resumes, got one "
                    "of another log: give the checkpoint's folder as "
                    "`DynamicLoraCallback(resume_from=...)`."
                )
        saved = {name: shape["r"] for name, shape in dynamic_state["layers"].items()}
        differing = [name for name, r in self.dynamic.ranks.items() if saved.get(name, r) != r]
        if differing:
            name = differing[0]
            raise ResumeError(
                f"The state in {folder} must be of the weights that were loaded, but {name!r} has "
                f"rank {self.dynamic.ranks[name]}, there {saved[name]}: give the checkpoint's "
                "folder as `DynamicLoraCallback(resume_from=...)`."
            )
        self.dynamic.load_state_dict(dynamic_state)

    def _checkpoint(self, args: Args, state: State) -> Path:
        given = [self._resume_from, args.resume_from_checkpoint, args.output_dir]
        usual = f"checkpoint-{state.global_step}"
        folders = [Path(str(path)) for path in given if path is not None]
        for folder in (*folders[:-1], folders[-1] / usual):
            if (folder / VALUES).is_file():
                return folder
        raise ResumeError(
            f"Resuming at step {state.global_step} needs the state of the dynamic ranks, but "
            f"{VALUES} is not in {folders[-1] / usual}: give the checkpoint's folder as "
            "`DynamicLoraCallback(resume_from=...)`."
        )


def _print(text: str, state: State) -> None:
    """Print as the Trainer prints losses, unless the log shows the same."""
    if state.is_world_process_zero and not logger.isEnabledFor(logging.INFO):
        tqdm.write(text)


def _written_checkpoint(args: Args, state: State) -> Path:
    """Return the folder of the checkpoint that the trainer has just written."""
    root, name = Path(str(args.output_dir)), f"checkpoint-{state.global_step}"
    if not state.is_hyper_param_search:
        return root / name
    # Each trial has its own folder, named after the trial or its number.
    return max(root.glob(f"*/{name}"), key=lambda folder: folder.stat().st_mtime)


def _shards_by_fsdp2() -> bool:
    """Return whether the Trainer's Accelerator shards models by FSDP2."""
    plugin = getattr(AcceleratorState(), "fsdp_plugin", None)
    return plugin is not None and plugin.fsdp_version == 2


def _check_arguments(args: Args) -> None:
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    stage = None if args.deepspeed_plugin is None else args.deepspeed_plugin.zero_stage
    shards = stage is not None or _shards_by_fsdp2()
    engines = {
        "FSDP1": fsdp and not _shards_by_fsdp2(),
        # The Trainer loads the best checkpoint into tensors of the last ranks.
        "load_best_model_at_end under FSDP2 or DeepSpeed": shards and args.load_best_model_at_end,
        "DeepSpeed with zero_stage=0": stage == 0,
        "several devices in one process": args.n_gpu > 1,
    }
    if getattr(args, "enable_jit_checkpoint", False):
        raise EngineError(
            "A Trainer must tell callbacks of every checkpoint, got enable_jit_checkpoint=True, "
            "with which it does not, and there could be no resuming: turn that off."
        )
    used = [name for name, on in engines.items() if on]
    if used:
        raise EngineError(
            "A Trainer must run in one process, or in several as torchrun starts them, one for a "
            f"device, also under FSDP2 and ZeRO, got {', '.join(used)}: turn that off, or use "
            "plain LoRA."
        )
