"""`dynlora combine A B ... --output DIR`: make one LoRA adapter of several."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import click

from dynlora.adapter_files.formats import DIFFUSERS, PEFT
from dynlora.cli.arguments import COUNT, FILE, NEW_ADAPTER, Verb, option
from dynlora.cli.output import Output, note
from dynlora.cli.resize import rank_changes, rank_table
from dynlora.errors import ConfigError

METHODS = {
    "linear": "weighted sum of the updates, exact because ranks add up",
    "ties": "per element the mean of the large updates that agree in sign",
    "dare": "weighted sum of random elements, scaled up",
    "dare-ties": "ties of random elements, scaled up",
}
DENSITY = 0.5  # default share of elements


def _run(given: Any, output: Output) -> None:
    _check_options(given)
    weights = _read_weights(given)

    from dynlora.adapter_files.reader import read_any
    from dynlora.adapter_files.writer import check_free

    check_free(given.output, DIFFUSERS if given.adapters[0].is_file() else PEFT)
    adapters = [read_any(place) for place in given.adapters]
    bases = [adapter.base_model for adapter in adapters]
    if len(set(bases)) > 1:
        names = ", ".join(base or "none" for base in dict.fromkeys(bases))
        note(output.progress, f"all adapters must be of one base model, but they name {names}")
    make = _add if given.method == "linear" else _mix
    values = {
        "output": str(given.output),
        "method": given.method,
        "weights": weights,
        "base_models": bases,
        **make(adapters, weights, given),
    }
    title = f"{len(adapters)} adapters in one: {given.output}"
    output.show(rank_table(title, values), values)


def _check_options(given: Any) -> None:
    if len(given.adapters) < 2:
        raise ConfigError(
            f"ADAPTER must be two adapters or more, but got {len(given.adapters)}. Give another."
        )
    sparse = given.method != "linear"
    if sparse and given.rank is None:
        raise ConfigError(f"`--method {given.method}` needs `--rank R`, but got none.")
    for name in ("rank", "density"):
        if not sparse and vars(given)[name] is not None:
            raise ConfigError(
                f"`--{name}` must be left out with `--method linear`, but got {vars(given)[name]}. "
                "Cut the sum with `dynlora resize`."
            )


def _read_weights(given: Any) -> list[float]:
    """Return a weight per adapter; by default those of the mean, which TIES is already."""
    count = len(given.adapters)
    if given.weights is None:
        return [1.0 if "ties" in given.method else 1 / count] * count
    try:
        weights = [float(word) for word in given.weights.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"`--weights` must be one number per adapter, such as {','.join(['0.5'] * count)}, but "
            f"got {given.weights}."
        )
    return weights


def _add(adapters: Sequence[Any], weights: Sequence[float], given: Any) -> dict[str, Any]:
    """Write the weighted sum of the adapters; return its figures."""
    from dynlora.adapter_files.combine import combine
    from dynlora.adapter_files.resize import resize

    made = combine(adapters, weights)
    return resize(made, {layer.name: layer.r for layer in made.layers}, given.output).to_dict()


def _mix(adapters: Sequence[Any], weights: Sequence[float], given: Any) -> dict[str, Any]:
    """Write the adapters combined by TIES or DARE; return the figures of the result."""
    from dynlora.adapter_files.combine import combine_sparse
    from dynlora.adapter_files.writer import write_adapter

    density = given.density or DENSITY
    made, kept = combine_sparse(
        adapters, weights, method=given.method, density=density, rank=given.rank
    )
    write_adapter(made, given.output)
    before = Counter[str]()
    for adapter in adapters:
        before.update({layer.name: layer.r for layer in adapter.layers})
    layers = [layer | {"energy_kept": kept[layer["name"]]} for layer in rank_changes(before, made)]
    total = sum(adapter.parameters for adapter in adapters)
    return {"parameters_before": total, "parameters": made.parameters, "layers": layers}


COMMAND = Verb(
    "combine",
    "one LoRA adapter of several: sum, TIES or DARE",
    _run,
    [
        click.Argument(
            ["adapters"],
            type=FILE,
            metavar="ADAPTER...",
            nargs=-1,
            help="Two or more LoRA adapters of one base model, all in one format: folders of PEFT, "
            "or .safetensors files of kohya or of diffusers.",
        ),
        NEW_ADAPTER,
        option(
            "--method",
            "; ".join(f"{name}: {purpose}" for name, purpose in METHODS.items()),
            click.Choice(list(METHODS)),
            default="linear",
        ),
        option(
            "--weights W,W",
            "Factors on the adapters' updates, such as 0.7,0.3 (default: the mean).",
        ),
        option("--rank R", "ties, dare: highest rank.", COUNT),
        option(
            "--density D",
            f"ties, dare: share of the elements to keep of each update (default: {DENSITY}).",
            click.FloatRange(0, 1, min_open=True, max_open=True),
        ),
    ],
)
