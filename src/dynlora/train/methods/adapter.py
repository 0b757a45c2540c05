"""Wrap a base model in a PEFT model, with a new or an already trained adapter."""

import difflib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from dynlora.adapter_files.adapter_base import check_fits
from dynlora.adapter_files.base_models import within
from dynlora.adapter_files.formats import PREFIX
from dynlora.adapter_files.reader import read_adapter
from dynlora.errors import AdapterError, ConfigError
from dynlora.train.config import JobConfig
from dynlora.train.methods.full_modules import hold_in_float32, linear_layers, reload_in_float32
from dynlora.train.methods.starts import takes_from_base
from dynlora.train.task import Task
from dynlora.train.tasks import TASKS

logger = logging.getLogger(__name__)


def add_adapter(base: Any, config: JobConfig) -> Any:
    """Return the model with a new LoRA adapter, or with the one in `lora.start_from`."""
    lora = config.lora
    if lora.start_from is not None:
        model = _continue_adapter(base, Path(lora.start_from), TASKS[config.task])
        peft_config = model.peft_config["default"]
        if config.method == "dynamic" and lora.r > peft_config.r:
            peft_config.r = lora.r  # `DynamicLora` reads the budget from it
        elif lora.r != peft_config.r:
            logger.warning(
                "lora.r=%d has no effect: the adapter in lora.start_from, of r=%d, keeps its "
                "ranks; `method: dynamic` with a higher lora.r lets them grow.",
                lora.r, peft_config.r,
            )  # fmt: skip
        return model
    # `begin_with_eva` initializes EVA later, because it needs the data.
    start = True if lora.init_lora_weights == "eva" else lora.init_lora_weights
    own: dict[str, Any] = {"r": lora.r, "use_rslora": lora.use_rslora, "use_dora": lora.use_dora}
    model = wrap(base, LoraConfig(init_lora_weights=start, **own, **common(base, config)))
    if not takes_from_base(lora):
        # PEFT refuses some ranks for some initializations when the saved adapter is loaded.
        model.peft_config["default"].init_lora_weights = True
    return model


def _continue_adapter(base: Any, folder: Path, task: Task) -> Any:
    adapter = read_adapter(folder)
    check_fits(adapter, base)
    brought = [key.removeprefix(PREFIX) for key in adapter.others]
    for module in task.head(base):
        # PEFT trains and saves only modules in the adapter; a missing head would stay random.
        if not any(within(key, [module]) for key in brought):
            raise AdapterError(
                f"`lora.start_from` must name an adapter of the same task, whose file holds the "
                f"head {module!r} too, got {folder}, whose file does not: to begin another task "
                "from it, make a model of both with `dynlora export --format merged` and name "
                "that as `model.path`."
            )
    peft_config = LoraConfig.from_pretrained(str(folder))
    peft_config.task_type = task.peft_type
    with _quiet_about_names():
        model = PeftModel.from_pretrained(base, folder, is_trainable=True, config=peft_config)
        reload_in_float32(model, folder)
    return _saved_plainly(model)


def common(base: Any, config: JobConfig) -> dict[str, Any]:
    """Return the arguments shared by `LoraConfig` and `AdaLoraConfig`."""
    task, target = TASKS[config.task], config.lora.target_modules
    head = task.head(base)
    return {
        "lora_alpha": config.lora.lora_alpha,
        "lora_dropout": config.lora.lora_dropout,
        "target_modules": target if isinstance(target, str) else list(target),
        "modules_to_save": [*config.lora.modules_to_save, *head] or None,
        "exclude_modules": linear_layers(base, [*head, *task.unread(base)]) or None,
        "task_type": task.peft_type,
    }


def wrap(base: Any, peft_config: LoraConfig) -> Any:
    """Return the model with a new adapter."""
    wanted = peft_config.target_modules
    if not isinstance(wanted, str):
        _check_names(base, sorted(wanted), key="target_modules", separator=".")
    _check_names(base, peft_config.modules_to_save or [], key="modules_to_save", separator="")
    try:
        with _quiet_about_names():
            model = get_peft_model(base, peft_config)
    except ValueError as error:
        shown = wanted if isinstance(wanted, str) else f"[{', '.join(sorted(wanted))}]"
        raise ConfigError(
            f"`lora.target_modules` must name modules that PEFT can adapt, got {shown} on a "
            f"{type(base).__name__}, whose {_seen(base)} ({' '.join(str(error).split())})"
        ) from error
    hold_in_float32(model)
    return _saved_plainly(model)


def _saved_plainly(model: Any) -> Any:
    """Make the model save only trained weights, and its configuration in a stable order.

    PEFT would also save an adapted embedding's base weights, and query the hub at each checkpoint
    for a changed vocabulary. Its configuration contains sets, whose order differs per process.
    """
    config = model.peft_config["default"]
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


def _check_names(base: Any, wanted: Sequence[str], *, key: str, separator: str) -> None:
    """Check that each ending, after `separator`, matches a module; PEFT needs only one match."""
    names = [name for name, _ in base.named_modules()]
    for ending in wanted:
        if not any(name == ending or name.endswith(f"{separator}{ending}") for name in names):
            near = difflib.get_close_matches(ending, {name.rpartition(".")[2] for name in names}, 1)
            advice = f" The nearest valid name is {near[0]!r}." if near else ""
            raise ConfigError(
                f"`lora.{key}` must match modules of the model, got {ending!r}, which "
                f"matches none of the {type(base).__name__}, whose {_seen(base)}{advice}"
            )


def _seen(base: Any) -> str:
    """Return the endings of the names of the model's layers with matrices as weights."""
    matrices = (name.split(".") for name, weight in base.named_parameters() if weight.ndim > 1)
    return f"layers end in {', '.join(sorted({path[-2:][0] for path in matrices}))}."


def lora_parameters(model: Any) -> int:
    """Return the allocated parameters in the model's LoRA layers, DoRA magnitudes included."""
    return sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for kind in set(module.adapter_layer_names)  # lists DoRA's magnitudes twice
        for parameter in module.get_submodule(kind).parameters()
    )


@contextmanager
def _quiet_about_names() -> Iterator[None]:
    """Silence a warning: peft 0.21 reads a deprecated attribute of transformers 5.24."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield
