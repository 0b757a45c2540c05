"""Stage 3. Input feature analyzer: inputs of each LoRA layer in, `FeatureStats` out.

Each layer keeps a uniform sample of its input tokens since the last event: the tokens with the
smallest keys (a bottom-k sample), each key hashed from example, position and step. So the sample
does not depend on batching, order or padding. All statistics are computed from it, at events only.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora.distributed import process_rank
from dynlora.samples import SAMPLE_SIZE, Sample, joined, share_tokens
from dynlora.small_matrices import batched, smaller_gram
from dynlora.types import UNUSED_KEY, FeatureStats, Tokens


class _Latest:
    """Cache of a function's last result, reused while the argument tensors are the same objects."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._asked: tuple[Tensor, ...] = ()
        self._found: Any = None

    def __call__(self, *tensors: Tensor) -> Any:
        same = len(tensors) == len(self._asked) and all(map(operator.is_, tensors, self._asked))
        if not same:
            self._asked, self._found = tensors, self._function(*tensors)
        return self._found


def _smallest(*keys: Int[Tensor, " _"]) -> tuple[Tensor, Tensor]:
    """Return the `SAMPLE_SIZE` smallest keys, ascending, and their indices in the concatenation."""
    joined = torch.cat(keys)
    kept, index = torch.topk(joined, min(SAMPLE_SIZE, len(joined)), largest=False)
    return kept, index


def _merged(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    return torch.cat([old, new])[index]


class InputFeatureAnalyzer:
    """Samples of each layer's inputs since the last event."""

    def __init__(self, names: Sequence[str] = (), device: torch.device | None = None) -> None:
        """Start without samples.

        Args:
            names: All layers, in the same order on every process; required for several processes.
            device: Device of the samples; required for several processes.
        """
        self._names, self._device = names, device
        self._samples: dict[str, Sample] = {}
        self._stale: set[str] = set()
        # Layers with the same input, such as query, key and value, keep one copy of its tokens.
        self._in_forward, self._in_merge = _Latest(_smallest), _Latest(_smallest)
        self._merge = _Latest(_merged)

    @torch.no_grad()
    def observe(
        self,
        name: str,
        keys: Int[Tensor, " tokens"],
        read: Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]],
    ) -> None:
        """Merge one forward's tokens into a layer's sample.

        Args:
            name: Module name.
            keys: Sampling key per token, `UNUSED_KEY` for padding.
            read: Returns the layer's inputs (vectors or ids) and outputs (base plus adapter) at
                given indices of `keys`; called only for the smallest keys.
        """
        kept, index = self._in_forward(keys)
        tokens, outputs = read(index)
        if tokens.dtype == torch.float64:
            tokens = tokens.float()
        power = outputs.float().square().sum(dim=1)
        old = self._samples.get(name)
        if old is not None and name not in self._stale:
            kept, index = self._in_merge(old.keys, kept)
            tokens = self._merge(old.tokens, tokens, index)
            power = _merged(old.output_power, power, index)
        self._stale.discard(name)
        self._samples[name] = Sample(keys=kept, tokens=tokens, output_power=power)

    def stats(self) -> dict[str, FeatureStats]:
        """Return input statistics by module name, over the samples of all processes.

        Layers without a sample, or with NaN or infinity in a sampled input or output, are left out.
        """
        samples, _ = self._joined()
        seen = _seen(samples)
        # Compute statistics once per distinct input, which query, key and value share.
        inputs = list({id(tokens): tokens for tokens, _ in seen.values()}.values())
        vectors = [as_vectors(tokens) for tokens in inputs]
        spectra = covariance_spectra(vectors)
        figures = {
            id(tokens): (float(spectrum.sum()) / vector.shape[1], effective_rank(spectrum))
            for tokens, vector, spectrum in zip(inputs, vectors, spectra, strict=True)
        }
        return {
            name: FeatureStats(
                tokens=tokens,
                variance=figures[id(tokens)][0],
                effective_rank=figures[id(tokens)][1],
                output_power=output_power,
            )
            for name, (tokens, output_power) in seen.items()
        }

    def restart(self) -> None:
        """Mark the samples as stale, to be replaced by the next tokens."""
        self._stale = set(self._samples)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the joined samples of all processes, as tensors keyed ``<module>/<field>``."""
        state: dict[str, Tensor] = {}
        samples, stale = self._joined()
        for name, sample in samples.items():
            state[f"{name}/keys"] = sample.keys.clone()  # safetensors refuses shared memory
            state[f"{name}/tokens"] = sample.tokens.clone()
            state[f"{name}/output_power"] = sample.output_power
            state[f"{name}/stale"] = torch.tensor(name in stale)
        return state

    def _joined(self) -> tuple[dict[str, Sample], set[str]]:
        return joined(self._names, self._samples, self._stale, device=self._device)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`; the first process gets all joined samples."""
        if process_rank() > 0:
            self._stale, self._samples = set(), {}
            return
        names = [key.removesuffix("/keys") for key in state if key.endswith("/keys")]
        self._stale = {name for name in names if bool(state[f"{name}/stale"])}
        samples = {
            name: Sample(
                keys=state[f"{name}/keys"],
                tokens=state[f"{name}/tokens"],
                output_power=state[f"{name}/output_power"],
            )
            for name in names
        }
        self._samples = share_tokens(samples)


def _seen(samples: Mapping[str, Sample]) -> dict[str, tuple[Tokens, float]]:
    """Return tokens and mean output power of each layer whose sample is not empty and finite.

    Layers that share their tokens get the same tensor.
    """
    if not samples:
        return {}
    # Samples are sorted by key, so padding comes last.
    used = torch.stack([(sample.keys != UNUSED_KEY).sum() for sample in samples.values()]).tolist()
    tokens: dict[int, Tensor] = {}
    totals, powers = [], []
    for sample, count in zip(samples.values(), used, strict=True):
        place = id(sample.tokens)
        if place not in tokens:
            shown = sample.tokens[:count]
            tokens[place] = shown.float() if shown.is_floating_point() else shown
        power = sample.output_power[:count]
        totals.append(tokens[place].sum() + power.sum())  # a sum keeps NaN and infinity
        powers.append(power.mean())
    finite = torch.stack(totals).isfinite().tolist()
    return {
        name: (tokens[id(sample.tokens)], power)
        for (name, sample), count, good, power in zip(
            samples.items(), used, finite, torch.stack(powers).tolist(), strict=True
        )
        if count and good
    }


def as_vectors(tokens: Tokens) -> Float[Tensor, "n dimensions"]:
    """Return vectors unchanged, and ids as one-hot vectors over the sampled ids."""
    if tokens.is_floating_point():
        return tokens
    _, places = torch.unique(tokens, return_inverse=True)
    return torch.nn.functional.one_hot(places).float()


def covariance_spectra(
    inputs: Sequence[Float[Tensor, "_ _"]],
) -> list[Float[Tensor, " _"]]:
    """Return the eigenvalues of each input's covariance that can be nonzero, ascending.

    Float32 is precise enough for their sum and entropy.

    Args:
        inputs: Sampled tokens of each layer, ``(n, in_features)``, in activation units.

    Returns:
        Per layer ``min(n, in_features)`` variances along the principal directions, in squared
        activation units, >= 0, which sum to the total variance; on the CPU.
    """
    grams = [smaller_gram(tokens - tokens.mean(dim=0)) / len(tokens) for tokens in inputs]
    return [variances for (variances,) in batched(_variances, grams)]


def _variances(covariances: Float[Tensor, "inputs k k"]) -> tuple[Float[Tensor, "inputs k"]]:
    return (torch.linalg.eigvalsh(covariances).clamp(min=0).cpu(),)


def effective_rank(spectrum: Float[Tensor, " n"], *, floor: float = 1e-12) -> float:
    """Return the entropy-based effective rank of a layer's centred input.

    With eigenvalues ``w`` and ``p = w / sum(w)`` it is ``exp(-sum(p log p))``: 1 if all inputs lie
    on a line, d if they fill d dimensions evenly. It is invariant to scaling and shifting.

    Args:
        spectrum: Eigenvalues of the covariance, >= 0, in squared activation units.
        floor: Largest sum at which the input counts as constant, in the same units.

    Returns:
        Effective rank in dimensions, within ``[1, n]``; 1 for constant input.

    Reference:
        Roy and Vetterli 2007, "The effective rank", EUSIPCO, pp. 606-610.
    """
    weights = spectrum.double()
    total = float(weights.sum())
    if total <= floor:
        return 1.0
    return float(torch.special.entr(weights / total).sum().exp())


def input_limits(features: Mapping[str, FeatureStats]) -> dict[str, float]:
    """Return the effective rank of each layer's input, if below half the sampled tokens.

    Near the sample size, the sample limits the effective rank.
    """
    return {
        name: stats.effective_rank
        for name, stats in features.items()
        if 2 * stats.effective_rank < len(stats.tokens)
    }
