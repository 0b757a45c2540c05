"""Stage 3. Input feature analyzer: inputs of each LoRA layer in, `FeatureStats` out.

Each layer keeps a uniform sample: the tokens with the smallest keys since the last event. Keys hash
example, position and step, so the sample does not depend on batching, order or padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora import distributed
from dynlora.small_matrices import batched, smaller_gram
from dynlora.types import SAMPLE_SIZE, UNUSED_KEY, FeatureStats, Tokens

_DTYPES = (torch.int64, torch.bfloat16, torch.float16, torch.float32)
"""Token dtypes by precision: processes that differ use the latest one."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One layer's input tokens with the smallest keys."""

    keys: Int[Tensor, " n"]
    tokens: Tokens
    """Inputs in their own dtype, at most float32."""
    output_power: Float[Tensor, " n"]
    """Squared norm of the layer's output per token."""


def smallest(*keys: Int[Tensor, " _"], size: int = SAMPLE_SIZE) -> tuple[Tensor, Tensor]:
    """Return the smallest keys, ascending, and their indices in the concatenation."""
    candidates = torch.cat(keys)
    kept, index = torch.topk(candidates, min(size, len(candidates)), largest=False)
    return kept, index


class InputFeatureAnalyzer:
    """Samples of each layer's inputs since the last event."""

    def __init__(self, names: Sequence[str] = (), device: torch.device | None = None) -> None:
        """Start without samples; several processes need `names`, in equal order, and `device`."""
        self._names, self._device = names, device
        self._samples: dict[str, Sample] = {}
        self._stale: set[str] = set()

    @torch.no_grad()
    def observe(
        self,
        name: str,
        keys: Int[Tensor, " tokens"],
        read: Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]],
    ) -> None:
        """Merge one forward's tokens into a layer's sample.

        `read` returns inputs and outputs (base plus adapter) at given indices of `keys`. It is
        called only for the smallest keys, because it copies.
        """
        kept, index = smallest(keys)
        tokens, outputs = read(index)
        if tokens.dtype == torch.float64:
            tokens = tokens.float()
        power = outputs.float().square().sum(dim=1)
        old = self._samples.get(name)
        if old is not None and name not in self._stale:
            kept, index = smallest(old.keys, kept)
            tokens = torch.cat([old.tokens, tokens])[index]
            power = torch.cat([old.output_power, power])[index]
        self._stale.discard(name)
        self._samples[name] = Sample(keys=kept, tokens=tokens, output_power=power)

    def stats(self) -> dict[str, FeatureStats]:
        """Return input statistics over the samples of all processes, if finite and not empty."""
        samples, _ = self._joined()
        seen = _seen(samples)
        vectors = [as_vectors(tokens) for tokens, _ in seen.values()]
        found = zip(seen.items(), vectors, covariance_spectra(vectors), strict=True)
        return {
            name: FeatureStats(
                tokens=tokens,
                variance=float(spectrum.sum()) / vector.shape[1],
                effective_rank=effective_rank(spectrum),
                output_power=output_power,
            )
            for (name, (tokens, output_power)), vector, spectrum in found
        }

    def restart(self) -> None:
        """Mark the samples as stale, to be replaced by the next tokens."""
        self._stale = set(self._samples)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the joined samples of all processes, as tensors keyed ``<module>/<field>``."""
        state: dict[str, Tensor] = {}
        samples, stale = self._joined()
        for name, sample in samples.items():
            state[f"{name}/keys"] = sample.keys
            state[f"{name}/tokens"] = sample.tokens
            state[f"{name}/output_power"] = sample.output_power
            state[f"{name}/stale"] = torch.tensor(name in stale)
        return state

    def _joined(self) -> tuple[dict[str, Sample], set[str]]:
        """Return the joined samples of all processes, and the names of the stale ones.

        They equal the sample of one process that sees all batches. A stale sample is used if no
        process has a newer one.
        """
        if distributed.process_count() == 1:
            return self._samples, self._stale
        own = [self._samples.get(name) for name in self._names]
        device = next((sample.keys.device for sample in own if sample is not None), self._device)
        fresh = [name in self._samples and name not in self._stale for name in self._names]
        table = [[new, *_format_of(sample)] for new, sample in zip(fresh, own, strict=True)]
        known = distributed.max_over_processes(torch.tensor(table, device=device)).tolist()
        found, stale = {}, set()
        for name, sample, new, properties in zip(self._names, own, fresh, known, strict=True):
            new_anywhere, dtype, width = properties
            if not new_anywhere:
                stale.add(name)
            if dtype >= 0:  # any process has a sample
                counting = sample if new == new_anywhere else None
                found[name] = _join(counting, _DTYPES[dtype], width, device)
        return found, stale

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`; the first process gets all joined samples."""
        if distributed.process_rank() > 0:
            self._stale, self._samples = set(), {}
            return
        names = [key.removesuffix("/keys") for key in state if key.endswith("/keys")]
        self._stale = {name for name in names if bool(state[f"{name}/stale"])}
        self._samples = {
            name: Sample(
                keys=state[f"{name}/keys"],
                tokens=state[f"{name}/tokens"],
                output_power=state[f"{name}/output_power"],
            )
            for name in names
        }


def _seen(samples: Mapping[str, Sample]) -> dict[str, tuple[Tokens, float]]:
    """Return tokens and mean output power of the samples that are finite and not empty."""
    if not samples:
        return {}
    # Samples are sorted by key, so padding comes last.
    used = torch.stack([(sample.keys != UNUSED_KEY).sum() for sample in samples.values()]).tolist()
    every, totals, powers = [], [], []
    for sample, count in zip(samples.values(), used, strict=True):
        shown, power = sample.tokens[:count], sample.output_power[:count]
        every.append(shown.float() if shown.is_floating_point() else shown)
        totals.append(every[-1].sum() + power.sum())  # a sum keeps NaN and infinity
        powers.append(power.mean())
    finite = torch.stack(totals).isfinite().tolist()
    found = zip(samples, every, torch.stack(powers).tolist(), used, finite, strict=True)
    return {name: (tokens, power) for name, tokens, power, count, good in found if count and good}


def as_vectors(tokens: Tokens) -> Float[Tensor, "n dimensions"]:
    """Return vectors unchanged, and ids as one-hot vectors over the sampled ids."""
    if tokens.is_floating_point():
        return tokens
    _, places = torch.unique(tokens, return_inverse=True)
    return torch.nn.functional.one_hot(places).float()


def covariance_spectra(
    inputs: Sequence[Float[Tensor, "_ _"]],
) -> list[Float[Tensor, " _"]]:
    """Return the covariance eigenvalues of each input that can be nonzero, ascending, on the CPU.

    They are in squared activation units. Float32 is precise enough for their sum and entropy.
    """
    grams = [smaller_gram(tokens - tokens.mean(dim=0)) / len(tokens) for tokens in inputs]
    return [variances for (variances,) in batched(_variances, grams)]


def _variances(covariances: Float[Tensor, "inputs k k"]) -> tuple[Float[Tensor, "inputs k"]]:
    return (torch.linalg.eigvalsh(covariances).clamp(min=0).cpu(),)


def effective_rank(spectrum: Float[Tensor, " n"], *, floor: float = 1e-12) -> float:
    """Return the effective rank of a layer's centred input, from its covariance eigenvalues ``w``.

    With ``p = w / sum(w)`` it is ``exp(-sum(p log p))``, in ``[1, len(w)]`` (Roy and Vetterli 2007,
    "The effective rank", EUSIPCO, pp. 606-610); 1 if ``sum(w)`` is at most `floor`.
    """
    weights = spectrum.double()
    total = float(weights.sum())
    if total <= floor:
        return 1.0
    return float(torch.special.entr(weights / total).sum().exp())


def input_limits(features: Mapping[str, FeatureStats]) -> dict[str, float]:
    """Return effective ranks below half the sampled tokens; the sample limits higher ones."""
    return {
        name: stats.effective_rank
        for name, stats in features.items()
        if 2 * stats.effective_rank < len(stats.tokens)
    }


def _join(
    own: Sample | None, dtype: torch.dtype, width: int, device: torch.device | None
) -> Sample:
    """Return one layer's tokens with the smallest keys over all processes.

    Processes exchange keys, then only the kept tokens; `width` is 0 for ids.
    """
    keys = torch.full((SAMPLE_SIZE,), UNUSED_KEY, device=device)
    shape = (SAMPLE_SIZE, width) if width else (SAMPLE_SIZE,)
    tokens = torch.zeros(shape, dtype=dtype, device=device)
    power = torch.zeros(SAMPLE_SIZE, device=device)
    if own is not None:
        keys[: len(own.keys)] = own.keys
    kept, origin = smallest(distributed.gather_from_processes(keys).flatten())
    if own is not None:
        mine = (origin // SAMPLE_SIZE == distributed.process_rank()) & (kept != UNUSED_KEY)
        slot = origin[mine] % SAMPLE_SIZE
        tokens[mine] = own.tokens.to(dtype)[slot]
        power[mine] = own.output_power[slot]
    return Sample(
        keys=kept,
        tokens=distributed.sum_over_processes(tokens),
        output_power=distributed.sum_over_processes(power),
    )


def _format_of(sample: Sample | None) -> tuple[int, int]:
    """Return the index of the tokens' dtype in `_DTYPES`, and their width; 0 for ids."""
    if sample is None:
        return -1, 0
    width = sample.tokens.shape[1] if sample.tokens.dim() == 2 else 0
    return _DTYPES.index(sample.tokens.dtype), width
