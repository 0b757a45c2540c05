"""A run's folder: what lies where, and what may be replaced."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from dynlora.errors import RunFolderError
from dynlora.files.whole import drafts_in, remove


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths inside a run's folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        """A stock PEFT adapter."""
        return self.root / "adapter"

    @property
    def full_model(self) -> Path:
        """The whole model and its tokenizer, with `method: full`."""
        return self.root / "model"

    @property
    def config(self) -> Path:
        """The resolved configuration; `dynlora train` takes it as it is."""
        return self.root / "config.yaml"

    @property
    def run(self) -> Path:
        """Versions, seed, parameters, metrics and times."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """One line for each time the Trainer logged."""
        return self.root / "metrics.jsonl"

    @property
    def ranks(self) -> Path:
        """One line for each event, with `method: dynamic`."""
        return self.root / "ranks.jsonl"

    @property
    def heatmap(self) -> Path:
        """Ranks by layer and time, with `method: dynamic`."""
        return self.root / "ranks.png"

    @property
    def report(self) -> Path:
        """The page that `dynlora report` writes; an old one shall not outlive its run."""
        return self.root / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.root / "checkpoints"

    @property
    def tracking(self) -> Path:
        """What trackers write, a folder each, with `training.report_to`."""
        return self.root / "tracking"

    @property
    def _all(self) -> tuple[Path, ...]:
        """Everything that a run writes."""
        folders = (self.adapter, self.full_model, self.checkpoints, self.tracking)
        files = (self.config, self.metrics, self.ranks, self.heatmap, self.report, self.run)
        return (*folders, *files)

    def check_usable(self) -> None:
        """Check that the folder is one, or can become one, and holds nothing of the user's own.

        Raises:
            RunFolderError: If a file stands in its place, a file or folder that is not a run's has
                a name that a run would write, or another process is writing here.
        """
        for path in (self.root, *self.root.parents):
            if path.exists() and not path.is_dir():
                raise RunFolderError(
                    f"`output` must be a folder, got {self.root}, but {path} is a file: give "
                    "another `--output`."
                )
        taken = [path.name for path in self._all if path.exists()]
        if taken and not self.run.exists():
            raise RunFolderError(
                f"`output` must be a folder in which a run can write {', '.join(taken)}, got "
                f"{self.root}, which holds that already, and no run.json to say that a run made "
                "it: give another `--output`."
            )
        if self._lock.exists():
            with self.held():
                pass

    @property
    def _lock(self) -> Path:
        """Held by the process that writes here; of a run that was killed it stays, held by none."""
        return self.root / "run.lock"

    def refuse_run(self) -> None:
        """Leave a run that is already here alone.

        Raises:
            RunFolderError: If the folder holds a run.
        """
        if self.run.exists():
            raise RunFolderError(
                f"`output` must be a folder without a run, got {self.root}, which holds one: give "
                "another `--output`, replace it with `--overwrite true`, or go on with it with "
                "`--training.resume latest`."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing here.

        Raises:
            RunFolderError: If one does already, or the folder cannot be written.
        """
        lock = FileLock(self._lock, blocking=False)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"`output` must be a folder that no other run writes to, got {self.root}, in which "
                "one is under way: wait until it has ended, or give another `--output`."
            ) from None
        except OSError as error:
            raise not_written(self.root, error) from error
        try:
            yield
        finally:
            self._lock.unlink(missing_ok=True)  # while it is held: nobody else can have it
            lock.release()

    def check_apart(self, inputs: Mapping[str, str | None]) -> None:
        """Check that nothing which a job reads would be removed by `clear`.

        Args:
            inputs: Place by the key of the configuration that names it; None where none is named.

        Raises:
            RunFolderError: If something would.
        """
        owned = [path.resolve() for path in self._all]
        for key, place in inputs.items():
            if place is not None and any(Path(place).resolve().is_relative_to(p) for p in owned):
                raise RunFolderError(
                    f"`{key}` must lie outside of what a run in {self.root} replaces, got {place}: "
                    "give another `--output`, or copy it elsewhere first."
                )

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder.

        Its record and configuration stay until the next run's take their place. A run that is
        killed in between can be started again then: its configuration may be the only one there is.
        """
        for path in (*self._all, *drafts_in(self.root)):
            if path not in (self.run, self.config):
                remove(path)


def not_written(root: Path, error: OSError) -> RunFolderError:
    """Return what to say of a folder that the operating system keeps from being written."""
    return RunFolderError(f"`output` must be a folder that can be written, got {root}: {error}")
