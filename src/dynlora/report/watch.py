"""Serve a page on this machine that follows runs, from their folders.

The page gets all its parts as a server-sent event, and later those that changed.
"""

import asyncio
import json
import math
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from dynlora.errors import DynamicLoraError
from dynlora.files.json_files import as_object
from dynlora.files.plain_values import parse_json
from dynlora.history import Event, describe
from dynlora.report import page, wording
from dynlora.report.run_comparison import labels_of
from dynlora.runs.checkpoints import way_on
from dynlora.runs.folder import RunFolder
from dynlora.runs.lines import event_lines, metric_lines
from dynlora.runs.reader import RunFiles, read_run, run_facts
from dynlora.runs.record import UNFINISHED, read_config

HOSTS = ["127.0.0.1", "localhost"]
"""Accepted values of the header `Host`; another site could let its own name lead here."""
PARTS = ("runs", "state", "curves", "ranks", "log", "settings")
POLL, OTHERS = 0.07, 5.0  # seconds between two looks at the files of the shown run, and of others
SHARE = 0.002  # of one core, for updates of files that change all the time
LONGEST_PAUSE = 20.0  # seconds between two updates
LOG_LINES = 200
MOST_LAYERS, SHOWN = 300, 100  # of more layers, those that moved most are shown
UNLOGGED = {"step", "peak_memory_bytes", "peak_gpu_memory_bytes"}
KEPT = 2  # runs whose files stay in memory
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address contains the token
    "X-Content-Type-Options": "nosniff",
}
TAIL = 2**14  # bytes of the newest log entries, for the list of runs
QUIET = 5.0  # seconds without a change after which a run without its lock counts as killed
REGULAR = {"eval": "evaluation", "save": "checkpoint"}  # by key of the configuration
SECTIONS: Any = page.PAGES.get_template("sections.html.j2").module


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a run has come."""

    name: str
    status: str  # of `run.json`, or `killed` or `unreadable`
    error: str = ""  # why the run failed or cannot be read
    step: int = 0
    planned: int | None = None  # optimizer steps of the whole run
    pace: float | None = None  # seconds per step, evaluations included, if the run goes on
    newest: Mapping[str, Any] = field(default_factory=dict)  # last value by logged key
    facts: Mapping[str, Any] = field(default_factory=dict)  # values of `run.json`
    config: Mapping[str, Any] = field(default_factory=dict)

    def until(self, step: float) -> float | None:
        """Return the seconds to a step; None if unknown."""
        return None if self.pace is None else self.pace * max(0.0, step - self.step)


class Watched:
    """A run whose record and newest log entries are read when its files change."""

    def __init__(self, root: Path, name: str) -> None:
        """Raise `RunFileError` if the folder is not a run's; `name` is shown for it."""
        self.folder, self.name = RunFolder(root), name
        self.marks: tuple[object, ...] = ()
        """Time, identity and size of each file, and whether the run was killed."""
        self.standing = self._read(killed=False)

    def look(self, *, locks: bool = True) -> None:
        """Update `marks`, and `standing` if a file changed; with `locks` find a killed run."""
        folder = self.folder
        marks = tuple(map(_mark, (folder.run, folder.config, folder.metrics, folder.ranks)))
        killed = marks == self.marks[:-1] and bool(self.marks[-1])
        if locks and self.standing.status == "running" and not killed:
            newest = max(changed for changed, *_ in marks)
            killed = time.time() - newest > QUIET and not folder.is_in_use()
        if (*marks, killed) == self.marks:
            return
        self.marks = (*marks, killed)
        try:
            self.standing = self._read(killed)
        except (DynamicLoraError, OSError) as error:
            self.standing = Standing(name=self.name, status="unreadable", error=str(error))

    def _read(self, killed: bool) -> Standing:
        folder = self.folder
        facts, lines = run_facts(folder), _newest_lines(folder.metrics)
        first = facts.get("resumed_from_step") or 0
        step = facts.get("steps") or max((line["step"] for line in lines), default=first)
        running, pace = facts["status"] == "running", None
        if running and not killed and step > first:
            spent = folder.metrics.stat().st_mtime - folder.run.stat().st_mtime
            pace = max(0.0, spent) / (step - first)
        return Standing(
            name=self.name,
            status="killed" if running and killed else facts["status"],
            error=str(facts.get("error", "")),
            step=step,
            planned=step if facts["status"] == "finished" else facts.get("planned_steps"),
            pace=pace,
            newest={key: value for line in lines for key, value in line.items()},
            facts=facts,
            config=read_config(folder.config),
        )


def _mark(path: Path) -> tuple[float, int, int]:
    """Return the time, the identity and the size of a file; zeros if it is missing."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return 0.0, 0, 0
    return state.st_mtime, state.st_ino, state.st_size


def _newest_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete log entries in the last `TAIL` bytes of a file, which may be missing."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - TAIL)
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").split("\n")
    found = []
    for line in lines[1 if start else 0 : -1]:
        with suppress(ValueError):
            found.append(as_object(parse_json(line)))
    return [line for line in found if type(line.get("step")) is int]


def upcoming(standing: Standing, folder: RunFolder) -> Iterator[str]:
    """Yield sentences about the next steps of a run, or of its user."""
    status, facts = standing.status, standing.facts
    if status == "unreadable":
        yield standing.error
    elif status == "finished":
        yield f"The run is finished: `dynlora report {shlex.quote(str(folder.root))}`."
    elif status != "running":
        yield f"The run {UNFINISHED.get(status, 'was killed')}. {standing.error}"
        launched = facts.get("processes", 1), facts.get("engine")
        advice = way_on(folder.root, facts.get("method", "unknown"), *launched)
        yield f"{advice[0].upper()}{advice[1:]}."
    else:
        for name, step in _next_steps(standing):
            left = standing.until(step)
            about = "" if left is None else f", in about {wording.about_text(left)}"
            yield f"{name}: step {step:,}{about}."


def _next_steps(standing: Standing) -> Iterator[tuple[str, int]]:
    """Yield the next step of each kind, the soonest first."""
    step, planned = standing.step, standing.planned
    found = [("Next event", each) for each in standing.facts.get("planned_events", ())]
    if planned is not None:
        found += [("Last step", planned)]
    training = standing.config.get("training", {})
    for key, name in REGULAR.items():
        apart = _steps_between(training, key, planned)
        if apart:
            following = math.ceil(apart * (math.floor(step / apart + 1e-9) + 1) - 1e-9)
            found += [(f"Next {name}", min(following, planned or following))]
    soonest = {name: at for name, at in sorted(found, key=lambda each: -each[1]) if at > step}
    return iter(sorted(soonest.items(), key=lambda each: each[1]))


def _steps_between(training: Any, key: str, planned: int | None) -> float | None:
    """Return the steps between evaluations or checkpoints; None if unknown or without any."""
    if not isinstance(training, Mapping):
        return None
    how, apart, epochs = (training.get(name) for name in (key, f"{key}_steps", "epochs"))
    if how == "steps" and isinstance(apart, int) and apart > 0:
        return apart
    if how != "epoch" or not planned or training.get("max_steps") is not None:
        return None
    if not isinstance(epochs, int | float) or not epochs > 0:
        return None
    return max(1.0, min(planned / epochs, planned))


class Shown:
    """The parts of the page about one run, rendered when they change."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._files = metric_lines(watched.folder.metrics), event_lines(watched.folder.ranks)
        self._marks: tuple[object, ...] = ()
        self._moved: object = None
        self._told: list[tuple[Event, str]] = []  # the text of each event
        self._parts: dict[str, str] = {}

    def parts(self) -> dict[str, str]:
        """Return the HTML by part; an unreadable run keeps its last ones."""
        if self.watched.marks != self._marks:
            self._marks = self.watched.marks
            try:
                self._render(read_run(self.watched.folder.root, *self._files))
            except (DynamicLoraError, OSError) as error:
                self._parts["log"] = SECTIONS.log([str(error)])
        return self._parts

    def _render(self, run: RunFiles) -> None:
        standing = self.watched.standing
        moved = (standing.status, run.written, len(run.events))
        if moved != self._moved:  # slow with thousands of layers
            self._moved = moved
            on = standing.status == "running"
            steps = (on and standing.planned) or run.steps
            most = SHOWN if len(run.final_ranks) > MOST_LAYERS else None
            ranks = page.rank_values(run, steps, most)
            table = SECTIONS.event_table(run, ranks["events"])
            self._parts["ranks"] = SECTIONS.ranks(ranks) + table + SECTIONS.model(ranks)
            told = {id(event): text for event, text in self._told}
            self._told = [(event, told.get(id(event)) or describe(event)) for event in run.events]
            facts = SECTIONS.fact_list(page.facts_of(run))
            self._parts["settings"] = SECTIONS.settings(run, facts)
        curves = page.curve_values(run)
        charts = SECTIONS.curves(run, curves)
        self._parts["curves"] = charts + SECTIONS.before_and_after(run, curves)
        self._parts["log"] = SECTIONS.log([*_log_lines(run, self._told)])


def _log_lines(run: RunFiles, told: Sequence[tuple[Event, str]]) -> Iterator[str]:
    """Yield the newest log entries and events as text, the last one first."""
    lines = [(entry["step"], _entry_text(entry)) for entry in run.metrics[-LOG_LINES:]]
    lines += [(event.step, text) for event, text in told]
    for step, text in sorted(lines, key=lambda line: line[0])[: -LOG_LINES - 1 : -1]:
        yield f"step {step:,}: {text}"


def _entry_text(entry: Mapping[str, Any]) -> str:
    values = {key: value for key, value in entry.items() if key not in UNLOGGED}
    texts = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return ", ".join(f"{key} {text}" for key, text in texts.items())


class Watcher:
    """The runs of a page, and its secret token."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raise `RunFileError` if a folder is not a run's."""
        self.runs = list(map(Watched, roots, labels_of(roots)))
        self.token = secrets.token_urlsafe(24)
        self._shown = lru_cache(maxsize=KEPT)(lambda number: Shown(self.runs[number]))
        self._looked = -OTHERS
        self._lock = Lock()  # streams of several pages read in threads

    def look(self, number: int) -> tuple[object, ...]:
        """Look at the files of a run, and less often at those of the others; return all marks."""
        now = time.monotonic()
        others = now - self._looked >= OTHERS
        self._looked = now if others else self._looked
        for run in self.runs if others else self.runs[number : number + 1]:
            run.look(locks=others)
        return tuple(run.marks for run in self.runs)

    def parts(self, number: int, *, whole: bool = True) -> dict[str, str]:
        """Return the HTML by part of the page about a run; only the quick ones unless `whole`."""
        with self._lock:
            standings, run = [run.standing for run in self.runs], self.runs[number]
            quick = {
                "runs": SECTIONS.run_list(standings, number),
                "state": SECTIONS.state(run.standing, [*upcoming(run.standing, run.folder)]),
            }
            return quick | (self._shown(number).parts() if whole else {})


def watch_app(watcher: Watcher) -> Starlette:
    """Return the server: the page at `/TOKEN/?run=NUMBER`, and its stream beside it."""

    def number_of(request: Request) -> int:
        """Return the number of the run; raise an error of HTTP without the token or such a run."""
        given, text = request.path_params["token"], request.query_params.get("run", "0")
        right = secrets.compare_digest(given.encode(), watcher.token.encode())
        known = text in map(str, range(len(watcher.runs)))
        if not right or not known:
            raise HTTPException(404)
        return int(text)

    async def show(request: Request) -> Response:
        number = number_of(request)
        watcher.look(number)
        parts = dict.fromkeys(PARTS, "") | watcher.parts(number, whole=False)
        nonce, name = secrets.token_urlsafe(16), watcher.runs[number].standing.name
        template = page.PAGES.get_template("watch.html.j2")
        html = template.render(parts=parts, nonce=nonce, number=number, name=name)
        policy = {"Content-Security-Policy": POLICY.format(nonce=nonce)}
        return HTMLResponse(html.encode("utf-8", "replace"), 200, HEADERS | policy)

    async def stream(request: Request) -> Response:
        changes = _changes(watcher, number_of(request))
        return StreamingResponse(changes, 200, HEADERS, media_type="text/event-stream")

    return Starlette(
        routes=[Route("/{token}/", show), Route("/{token}/events", stream)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
    )


async def _changes(watcher: Watcher, number: int) -> AsyncIterator[str]:
    """Yield the changed parts of a page as server-sent events, as often as `SHARE` permits."""
    sent: dict[str, str] = {}
    seen: tuple[object, ...] = ()
    while True:  # until the page is closed, which cancels this task
        pause, used = POLL, time.process_time()
        marks = watcher.look(number)
        if marks != seen:
            whole = not seen or marks[number] != seen[number]
            parts = await run_in_threadpool(watcher.parts, number, whole=whole)
            changed = {part: html for part, html in parts.items() if sent.get(part) != html}
            if changed:
                yield f"data: {json.dumps(changed)}\n\n"
            if seen:  # the first page is for the reader, not for the run
                used = time.process_time() - used
                pause = max(POLL, min(LONGEST_PAUSE, used / SHARE))
            sent, seen = sent | parts, marks
        await asyncio.sleep(pause)
