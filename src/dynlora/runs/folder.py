"""Paths in a run's folder, and the checks before files are replaced."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dynlora.errors import RunFolderError
from dynlora.files.whole import DRAFT, remove


class RunFolder:
    """Paths inside a run's folder, and the checks before a run writes there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "adapter"  # a stock PEFT adapter
        self.full_model = root / "model"  # the whole model and its tokenizer, with `method: full`
        self.config = root / "config.yaml"  # the resolved configuration, for `dynlora train`
        self.run = root / "run.json"  # versions, seed, parameters, metrics and times
        self.metrics = root / "metrics.jsonl"  # one line per Trainer log entry
        self.ranks = root / "ranks.jsonl"  # one line per event, with `method: dynamic`
        self.heatmap = root / "ranks.png"  # ranks by layer and step, with `method: dynamic`
        self.report = root / "report.html"  # the page of `dynlora report`; a new run removes it
        self.checkpoints = root / "checkpoints"  # the Trainer's
        self.tracking = root / "tracking"  # one folder per tracker, with `training.report_to`
        # A killed run leaves the lock file, but no lock.
        self._lock = root / "run.lock"
        self._all = (
            *(self.adapter, self.full_model, self.checkpoints, self.tracking),
            *(self.config, self.metrics, self.ranks, self.heatmap, self.report, self.run),
        )

    def check_usable(self) -> None:
        """Check that a run can write here without replacing the user's own files.

        Raises `RunFolderError` if the path or a parent is a file, a run's file or folder exists
        without `run.json`, or another process is writing here.
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

    def refuse_run(self) -> None:
        """Raise `RunFolderError` if the folder contains a run."""
        if self.run.exists():
            raise RunFolderError(
                f"`output` must be a folder without a run, got {self.root}, which holds one: give "
                "another `--output`, replace it with `--overwrite true`, or go on with it with "
                "`--training.resume latest`."
            )

    def is_in_use(self) -> bool:
        """Return whether a run's process writes here; a free lock is taken for a moment.

        A lock that this user may not take could be held.
        """
        if not self._lock.exists():
            return False
        try:
            with FileLock(self._lock, blocking=False):
                return False
        except OSError:  # filelock's `Timeout` is one
            return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create and lock the folder; raise `RunFolderError` if another process has the lock."""
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
            self._lock.unlink(missing_ok=True)  # before the release, so no other process has it
            lock.release()

    def check_apart(self, inputs: Mapping[str, str | None]) -> None:
        """Raise `RunFolderError` if `clear` would remove an input of the job."""
        owned = [path.resolve() for path in self._all]
        for key, place in inputs.items():
            if place is not None and any(Path(place).resolve().is_relative_to(p) for p in owned):
                raise RunFolderError(
                    f"`{key}` must lie outside of what a run in {self.root} replaces, got {place}: "
                    "give another `--output`, or copy it elsewhere first."
                )

    def clear(self) -> None:
        """Remove a run's files and drafts, except `run.json` and `config.yaml`.

        The new run overwrites these two. If it is killed before that, the old configuration, which
        may be the only copy, still exists.
        """
        for path in (*self._all, *self.root.glob(f"{DRAFT}*")):
            if path not in (self.run, self.config):
                remove(path)


def not_written(root: Path, error: OSError) -> RunFolderError:
    """Return the error for a folder that cannot be written."""
    return RunFolderError(f"`output` must be a folder that can be written, got {root}: {error}")
