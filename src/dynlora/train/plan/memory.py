"""Predicted peak memory: two rehearsals and the run's batches in, bytes by kind out."""

from dataclasses import asdict, dataclass

from dynlora.train.plan.rehearsal import Rehearsal
from dynlora.train.plan.replay import most_held
from dynlora.train.plan.trace import Event, left_live, most_live, scale

ROWS = 2
"""Rows of the smaller of a method's two rehearsals; 1 is a special case of some operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """The batches of a run."""

    training: int
    """Rows of a training batch."""
    evaluation: int
    """Rows of an evaluation's batch."""
    training_shapes: int
    """How many shapes training batches have."""
    evaluation_shapes: int

    @property
    def differ(self) -> bool:
        """Whether shapes are as many as where rows are of different lengths."""
        return max(self.training_shapes, self.evaluation_shapes) > 2  # of which one is the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """What the process takes beside tensors, in bytes; all 0 on an accelerator."""

    base: int
    """Python, libraries and data, with the kernels of one shape of each kind."""
    loading: int
    """Most bytes while the model is loaded, all things together."""
    training_kernels: int
    """Kernels of each shape of a training batch."""
    evaluation_kernels: int
    """Kernels of each shape of an evaluation's batch."""
    adapter_kernels: int
    """Part of `training_kernels` that is for adapters."""
    rank_kernels: int
    """Kernels of each shape of a training batch for a rank that layers of one shape have not had:
    not part of any peak, because it is not known before how many ranks there will be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory that a method will take, in bytes; its parts are not all there at the same time."""

    weights: int
    """Parameters and buffers of the model, with what the method adds."""
    gradients: int
    optimizer: int
    """The optimizer's state."""
    activations: int
    """Most that a step's forward and backward pass adds, gradients included."""
    allocator: int
    """What the allocator holds beyond the tensors."""
    process: int
    """Python, libraries, data and kernels; 0 on an accelerator."""
    loading: int
    """Most at once while the model is loaded."""
    peak: int
    """Most at once, predicted."""
    roughly: bool
    """Whether the operations depend on the rows of a batch, so that tensors could not be followed
    from 2 rows to 3: the peaks alone were, and the allocator's share is not known."""

    def to_dict(self) -> dict[str, int | bool]:
        """Return the values by name."""
        return asdict(self)


def predict_memory(
    rehearsal: Rehearsal, larger: Rehearsal, batches: Batches, process: Process
) -> MemoryPlan:
    """Return what a method will take.

    Two times matter: the first step, before which an evaluation has made all its kernels, and all
    later ones, by whose end those of every shape of a batch are there.

    Args:
        rehearsal: With `ROWS` rows.
        larger: With one row more.
        batches: Those of the run.
        process: What the process takes beside tensors.
    """
    parts = _scaled(rehearsal, larger, batches)
    live, held, activations = (
        _extrapolated(rehearsal, larger, batches) if parts is None else _replayed(rehearsal, parts)
    )
    evaluated = process.base + process.evaluation_kernels * (batches.evaluation_shapes - 1)
    trained = evaluated + process.training_kernels * (batches.training_shapes - 1)
    peaks = [beside + tensors for beside, tensors in zip((evaluated, trained), held, strict=True)]
    worst = peaks.index(max(peaks))
    return MemoryPlan(
        weights=rehearsal.weights,
        gradients=rehearsal.gradients,
        optimizer=rehearsal.optimizer,
        activations=activations,
        allocator=max(held[worst] - live[worst], 0),
        process=(evaluated, trained)[worst],
        loading=process.loading,
        peak=max(rehearsal.weights + peaks[worst], process.loading),
        roughly=parts is None,
    )


Figures = tuple[list[int], list[int], int]
"""Most bytes in tensors and most held by the allocator, each until the first step's end and after
it; and what the first step adds."""


def _replayed(rehearsal: Rehearsal, parts: list[list[Event]]) -> Figures:
    # An accelerator's allocator is torch's own, which glibc knows nothing of.
    on_cpu = rehearsal.trace.device.type == "cpu"
    events = [event for part in parts for event in part]
    live = _most_live(events, len(parts[0]))
    held = (most_held(parts) if on_cpu else None) or live
    # Small tensors may find room that the allocator held before the first of them.
    return live, [max(pair) for pair in zip(held, live, strict=True)], _added(events, rehearsal)


def _extrapolated(rehearsal: Rehearsal, larger: Rehearsal, batches: Batches) -> Figures:
    def figures(of: Rehearsal) -> list[int]:
        phases = of.trace.phases
        later = phases.get("step 2", phases["end"])
        return [*_most_live(of.trace.events, later), _added(of.trace.events, of)]

    more = batches.training - ROWS
    first, second, added = (
        before + more * (after - before)
        for before, after in zip(figures(rehearsal), figures(larger), strict=True)
    )
    return [first, second], [first, second], added


def _most_live(events: list[Event], later: int) -> list[int]:
    return [most_live(events[:later]), most_live(events, later)]


def _added(events: list[Event], rehearsal: Rehearsal) -> int:
    """Return what the first step adds to what was there before it."""
    phases = rehearsal.trace.phases
    begin, end = phases["step 1"], phases.get("step 2", phases["end"])
    return most_live(events[:end], begin) - left_live(events[:begin])


def _scaled(rehearsal: Rehearsal, larger: Rehearsal, batches: Batches) -> list[list[Event]] | None:
    """Return the run's allocations until the first step's end, and after it, if they are known."""
    small, large = rehearsal.trace, larger.trace
    if small.phases != large.phases:
        return None
    training, later = small.phases["training"], small.phases.get("step 2", small.phases["end"])

    def part(begin: int, end: int | None, wanted: int) -> list[Event] | None:
        return scale(small.events[begin:end], large.events[begin:end], rows=ROWS, wanted=wanted)

    evaluated = part(0, training, batches.evaluation)
    first = part(training, later, batches.training)
    rest = part(later, None, batches.training)
    if evaluated is None or first is None or rest is None:
        return None
    return [evaluated + first, rest]
