"""`dynlora export ADAPTER --format FORMAT --output DIR`: rewrite an adapter, or merge it."""

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from dynlora.adapter_files.formats import DIFFUSERS, KOHYA, KOHYA_PREFIXES, PEFT
from dynlora.cli.arguments import ADAPTER, COUNT, NEW_ADAPTER, Verb, option
from dynlora.cli.output import Output, note, readable_messages
from dynlora.cli.resize import rank_changes, rank_table
from dynlora.errors import ConfigError

FORMATS = {
    "native": "a stock PEFT adapter with the ranks it has, one pattern a layer",
    KOHYA: "one file as sd-scripts, ComfyUI and other tools of Stable Diffusion read it",
    DIFFUSERS: "one file as `load_lora_weights` reads it",
    "uniform": "one rank, padded with zeros, scaling folded in: the same function, for servers",
    "mlx": "a folder as MLX-LM reads it, at one rank as uniform",
    "merged": "the base model with the adapter in its weights, and the tokenizer or processor",
    "onnx": "the merged model in float32 for ONNX Runtime, and the tokenizer",
    "onnx-lora": "the base model in float32 for ONNX Runtime, the adapter to switch on, and the "
    "tokenizer",
}
CONVERTED = {"native": PEFT, KOHYA: KOHYA, DIFFUSERS: DIFFUSERS}
MERGED = ("merged", "onnx", "onnx-lora")
FOLDERS = (*MERGED, "mlx")
TAKES = {
    "rank": ("uniform",),
    "model": (*MERGED, "native", DIFFUSERS),
    "component": tuple(CONVERTED),
}
"""Formats that accept an option, by option."""


def _run(given: Any, output: Output) -> None:
    _check_options(given)

    from dynlora.adapter_files.reader import read_any
    from dynlora.adapter_files.writer import check_free

    own = DIFFUSERS if given.adapter.is_file() else PEFT
    check_free(given.output, (CONVERTED | dict.fromkeys(FOLDERS, PEFT)).get(given.format, own))
    adapter = read_any(given.adapter)
    show = _merge if given.format in MERGED else _rewrite
    show(adapter, given, output)
    if given.push_to_hub is not None:
        _push(given.output, given.push_to_hub, output)


def _push(path: Path, repository: str, output: Output) -> None:
    """Upload a folder or file to a model repository of the hub, created if there is none."""
    from huggingface_hub import HfApi

    try:
        place = HfApi().create_repo(repository, private=True, exist_ok=True)
        if path.is_dir():
            HfApi().upload_folder(repo_id=place.repo_id, folder_path=path)
        else:
            HfApi().upload_file(repo_id=place.repo_id, path_or_fileobj=path, path_in_repo=path.name)
    except (OSError, ValueError) as error:  # of the hub, the network, or the name
        raise ConfigError(
            f"`--push_to_hub` must be a repository that you may write to, but got {repository} "
            f"({' '.join(str(error).split())}). {path} is written: log in with `hf auth login`."
        ) from error
    output.progress.print(f"uploaded to {place}")


def _check_options(given: Any) -> None:
    for name, formats in TAKES.items():
        value = vars(given)[name]
        if value is not None and given.format not in formats:
            raise ConfigError(
                f"`--{name}` needs `--format {' or '.join(formats)}`, but got {value} with "
                f"{given.format}. Leave it out."
            )


def _merge(adapter: Any, given: Any, output: Output) -> None:
    from dynlora.adapter_files.adapter import check_linear
    from dynlora.adapter_files.adapter_base import locate_base
    from dynlora.adapter_files.merge import merge_adapter, save_merged
    from dynlora.adapter_files.onnx import check_packages, save_onnx, save_onnx_lora
    from dynlora.train.finished_run import outputs_of

    if given.format != "merged":
        check_packages()
    if given.format == "onnx-lora":
        check_linear(adapter, given.format)
    saves = {"merged": save_merged, "onnx": save_onnx, "onnx-lora": save_onnx_lora}
    source = locate_base(adapter, given.model)
    with readable_messages(output.progress):
        head = outputs_of(adapter.folder)
        kind, saved = merge_adapter(adapter, source, given.output, head, saves[given.format])
    values = {
        "format": given.format,
        "output": str(given.output),
        "base_model": source.label,
        "tokenizer": saved and kind != "image processor",
        "image_processor": saved and kind != "tokenizer",
    }
    missing = "" if saved else f", without a {kind}"
    output.show(Text(f"{given.format} model: {given.output}, from {source.label}{missing}"), values)


def _rewrite(adapter: Any, given: Any, output: Output) -> None:
    from dynlora.adapter_files.convert import convert
    from dynlora.adapter_files.mlx import write_mlx
    from dynlora.adapter_files.resize import uniform
    from dynlora.adapter_files.writer import write_adapter

    if given.format in CONVERTED:
        model = None if given.model is None else Path(given.model)
        made = adapter = convert(adapter, CONVERTED[given.format], given.component, model)
    else:
        made = uniform(adapter, given.rank)
    write = write_mlx if given.format == "mlx" else write_adapter
    write(made, given.output)
    values = {
        "format": given.format,
        "output": str(given.output),
        "parameters_before": adapter.parameters,
        "parameters": made.parameters,
        "layers": rank_changes({layer.name: layer.r for layer in adapter.layers}, made),
    }
    if made.parameters > adapter.parameters:
        growth = made.parameters / adapter.parameters
        advice = "because all ranks are the highest. Lower ranks: `dynlora resize`."
        note(output.progress, f"the result has {growth:.1f} times the parameters, {advice}")
    title = f"{given.format} adapter: {given.output}"
    output.show(rank_table(title, values), values)


COMMAND = Verb(
    "export",
    "rewrite an adapter for a server, or merge it",
    _run,
    [
        ADAPTER,
        option(
            "--format",
            "; ".join(f"{name}: {purpose}" for name, purpose in FORMATS.items()),
            click.Choice(list(FORMATS)),
            required=True,
        ),
        NEW_ADAPTER,
        option(
            "--rank R", "uniform: rank of all layers (default: the highest rank of a layer).", COUNT
        ),
        option(
            "--model PATH",
            "merged, onnx and onnx-lora: folder, GGUF file or hub name of the base model, if "
            "the adapter does not name an existing folder. native and diffusers, for a file of "
            "kohya: folder of the base model as a pipeline of diffusers.",
        ),
        option(
            "--component",
            "Component of a pipeline that a PEFT adapter, read or written, belongs to.",
            click.Choice(list(KOHYA_PREFIXES)),
        ),
        option(
            "--push_to_hub OWNER/NAME",
            "Also upload the result to this repository of the hub, private if it is new.",
        ),
    ],
)
