"""The base model of a saved adapter: find it, load it with the right head, attach the adapter."""

import copy
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.base_models import (
    UNLOADABLE,
    Source,
    load_weights,
    refuse_random,
    within,
)
from dynlora.adapter_files.formats import PEFT, PREFIX
from dynlora.errors import AdapterError

FORMS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Class of transformers with the head for each PEFT task type."""
POOLER = "pooler"  # pooler of a model without a head that uses it
HEAD = re.compile(r"(?:.*\.)?(?:\w*classifier|score|classification_head|logits_proj)\b.*\.weight")
"""Names of the weights of a classifier trained with the adapter."""


def locate_base(adapter: SavedAdapter, given: str | None) -> Source:
    """Return the base model's location: the folder, GGUF file or hub name `given` by the user.

    Without it, the adapter's own name counts only if it is a folder or a downloaded hub model,
    because an untrusted adapter must not trigger downloads.
    """
    if adapter.form != PEFT:
        raise AdapterError(
            f"a base model is loaded only for a PEFT folder, but got {adapter.folder}, a file of "
            f"{adapter.form}. Convert it with `dynlora export --format native`."
        )
    if given is None:
        named = adapter.base_model
        if named and named.lower().endswith(".gguf") and Path(named).is_file():
            return Source(str(Path(named).parent), gguf_file=Path(named).name, local_only=True)
        if not (named and _is_here(named)):
            raise AdapterError(
                f"the base model must be known, but the adapter in {adapter.folder} names "
                f"{named or 'none'}, which is no folder with a model and was never downloaded "
                "here. Give the model's folder, GGUF file or hub name with `--model`."
            )
        return Source(named, local_only=True)
    path = Path(given)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise AdapterError(f"`--model` must be an existing GGUF file, but got {path}.")
        return Source(str(path.parent), gguf_file=path.name)
    if path.exists() and not (path / "config.json").is_file():
        raise AdapterError(
            f"`--model` must be a folder with a model, but got {path}, which has no config.json."
        )
    return Source(given)


def _is_here(name: str) -> bool:
    """Return whether a folder or hub model can be loaded without a download."""
    with suppress(HFValidationError):  # not a valid hub name
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return True
    with suppress(OSError):  # not a valid path
        return (Path(name) / "config.json").is_file()
    return False


def load_base(adapter: SavedAdapter, source: Source) -> Any:
    """Load the base model with the adapter's kind of head, and check that both fit.

    Weights may be missing in the model's files only if the adapter has them.
    """
    try:
        config = AutoConfig.from_pretrained(source.place, **source.options)
        form = _form(adapter, config)
        labels = _count_labels(adapter)
        if labels is not None and config.num_labels != labels:
            config.num_labels = labels
        base, random = load_weights(
            form, source.place, config=config, dtype="auto", **source.options
        )
        base = base if source.gguf_file is None else _unpacked(base)
        # First, because a wrong base model gets a clearer error here than from missing weights.
        check_fits(adapter, base)
        brought = {key.removeprefix(PREFIX) for key in adapter.others}
        refuse_random(base, [n for n in random - brought if not within(n, [POOLER])])
    except UNLOADABLE as error:
        reason = " ".join(str(error).split())
        raise AdapterError(f"the model {source.label} could not be loaded: {reason}") from error
    return base.eval()


def attach(folder: Path, base: nn.Module) -> PeftModel:
    """Return the base model with the adapter in a folder, loaded by PEFT."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, folder)
        # PEFT only warns about missing weights and keeps their initial values.
        for warning in caught:
            if "missing adapter keys" in str(warning.message):
                raise ValueError(str(warning.message))
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(
            f"the adapter in {folder} must load on its base model, a "
            f"{type(base).__name__}: {' '.join(str(error).split())} Use the model that it was "
            "trained on."
        ) from error
    return model.eval()


def check_fits(adapter: SavedAdapter, base: nn.Module) -> None:
    """Check by names and shapes that every tensor of an adapter fits a model with its head."""
    modules = dict(base.named_modules())
    for layer in adapter.layers:
        if layer.name not in modules:
            raise _misfit(adapter, base, f"no module {layer.name!r}")
        wanted = tuple(sorted((layer.lora_A.shape[1], len(layer.lora_B))))
        found = _widths(modules[layer.name])
        if wanted != found:
            widths = f"widths {found} instead of {wanted}" if found else "no `weight`"
            raise _misfit(adapter, base, f"{widths} in {layer.name!r}")
    parameters = dict(base.named_parameters())
    for key, tensor in adapter.others.items():
        name = key.removeprefix(PREFIX)
        if name in parameters and parameters[name].shape != tensor.shape:
            shapes = f"{tuple(parameters[name].shape)} instead of {tuple(tensor.shape)}"
            raise _misfit(adapter, base, f"shape {shapes} in {name!r}")


def _widths(module: Any) -> tuple[int, ...]:
    """Return a layer's two widths, smaller first; for a convolution, its channels."""
    if isinstance(module, nn.Linear):  # quantized weights have another shape
        return tuple(sorted((module.in_features, module.out_features)))
    weight = getattr(module, "weight", torch.empty(()))  # `nn.MultiheadAttention` has none
    return tuple(sorted(weight.shape[:2]))


def _misfit(adapter: SavedAdapter, base: nn.Module, fault: str) -> AdapterError:
    return AdapterError(
        f"the adapter in {adapter.folder} must fit its base model, but this {type(base).__name__} "
        f"has {fault}. Use the model that the adapter was trained on, "
        f"{adapter.base_model or 'unknown'}, with the same number of labels."
    )


def tied_weights(model: nn.Module) -> dict[str, list[str]]:
    """Return by each parameter's name all names of the same parameter."""
    groups: dict[int, list[str]] = {}
    for place, module in model.named_modules():
        for name, weight in module.named_parameters(place, recurse=False):
            groups.setdefault(id(weight), []).append(name)
    return {name: names for names in groups.values() for name in names}


@torch.no_grad()
def untie(base: Any, adapter: SavedAdapter) -> None:
    """Untie output layer and embeddings if the adapter changes any of them."""
    touched = [f"{layer.name}.weight" for layer in adapter.layers]
    touched += [key.removeprefix(PREFIX) for key in adapter.others]
    tied = tied_weights(base)
    shared = {other for name in touched for other in tied.get(name, [])[1:]}
    for name in shared:
        place, _, own = name.rpartition(".")
        setattr(base.get_submodule(place), own, nn.Parameter(base.get_parameter(name).clone()))
    if shared:
        base.config.tie_word_embeddings = False


def _unpacked(model: Any) -> Any:
    """Return a GGUF model as an ordinary one, which transformers can save."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def _form(adapter: SavedAdapter, config: Any) -> Any:
    """Return the class to load the base model with."""
    if task := FORMS.get(str(adapter.config.get("task_type"))):
        return getattr(transformers, task)
    mapping = adapter.config.get("auto_mapping") or {}
    return model_class(mapping.get("base_model_class"), config, str(adapter.folder))


def model_class(name: str | None, config: Any, where: str) -> Any:
    """Return a model's class of transformers by name, or by default that of its configuration."""
    name = name or next(iter(config.architectures or []), "none")
    # The name comes from an untrusted file, so accept only models of transformers.
    form = getattr(transformers, str(name), None)
    if not (isinstance(form, type) and issubclass(form, transformers.PreTrainedModel)):
        raise AdapterError(
            f"the base model must be of a class of transformers, but got {name!r} from {where}. "
            "Use PEFT in your own code."
        )
    return form


def _count_labels(adapter: SavedAdapter) -> int | None:
    """Return the number of outputs of the classifier trained with the adapter, if any."""
    heads = [t for key, t in adapter.others.items() if HEAD.fullmatch(key) and t.dim() == 2]
    read = {head.shape[1] for head in heads}
    last = [len(head) for head in heads if len(head) not in read]  # last layer of a deep head
    return min(last or map(len, heads), default=None)
