"""Serve a page on this machine that follows runs, from their folders.

The page gets all its parts as a server-sent event, and later those that changed.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from dynlora.errors import DynamicLoraError
from dynlora.history import describe
from dynlora.report import page
from dynlora.report.standing import Watched, upcoming
from dynlora.runs.reader import RunFiles, RunReader

HOSTS = ["127.0.0.1", "localhost"]
"""Accepted values of the header `Host`; another site could let its own name lead here."""
PARTS = ("runs", "state", "curves", "ranks", "log", "settings")
POLL = 0.1  # seconds between two looks at the files
SHARE = 0.004  # of one core, for updates on average
LONGEST_PAUSE = 10.0  # seconds between two updates of files that change all the time
ALIVE = 15.0  # seconds between empty messages, which find closed connections
LOG_LINES = 200
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
SECTIONS: Any = page.PAGES.get_template("sections.html.j2").module


class Shown:
    """The parts of the page about one run, rendered when they change."""

    def __init__(self, watched: Watched) -> None:
        self.watched = watched
        self._reader = RunReader(watched.folder.root)
        self._marks: tuple[object, ...] = ()
        self._moved: object = None
        self._told: list[tuple[int, str]] = []  # step and text per event
        self._parts: dict[str, str] = {}

    def parts(self) -> Mapping[str, str]:
        """Return the HTML by part; an unreadable run keeps its last ones."""
        if self.watched.marks != self._marks:
            self._marks = self.watched.marks
            try:
                self._render(self._reader.read())
            except (DynamicLoraError, OSError) as error:
                self._parts["log"] = SECTIONS.log([str(error)])
        return self._parts

    def _render(self, run: RunFiles) -> None:
        standing = self.watched.standing
        moved = (standing.status, run.written, len(run.events))
        if moved != self._moved:  # slow with thousands of layers
            self._moved = moved
            on = standing.status == "running"
            values = page.rank_values(run, (on and standing.planned) or run.steps)
            self._parts["ranks"] = (
                SECTIONS.ranks(run, values["rank_map"], values["scale"])
                + SECTIONS.event_table(run, values["events"])
                + SECTIONS.model(values["parts"], values["layers"])
            )
            self._told = [(event.step, describe(event)) for event in run.events]
            facts = SECTIONS.fact_list(page.facts_of(run))
            self._parts["settings"] = SECTIONS.settings(run, page.origin_of(run), facts)
        values = page.curve_values(run)
        costs = values["metrics"], values["parameters"], values["costs"]
        curves = SECTIONS.curves(run, values["charts"], values["evaluations"])
        self._parts["curves"] = curves + SECTIONS.before_and_after(run, *costs)
        self._parts["log"] = SECTIONS.log([*_log_lines(run, self._told)])


def _log_lines(run: RunFiles, events: Sequence[tuple[int, str]]) -> Iterator[str]:
    """Yield the newest log entries and events as text, the last one first."""
    lines = [(entry["step"], _entry_text(entry)) for entry in run.metrics[-LOG_LINES:]]
    for step, text in sorted([*lines, *events], key=lambda line: line[0])[: -LOG_LINES - 1 : -1]:
        yield f"step {step:,}: {text}"


def _entry_text(entry: Mapping[str, Any]) -> str:
    values = {key: value for key, value in entry.items() if key not in UNLOGGED}
    texts = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return ", ".join(f"{key} {text}" for key, text in texts.items())


class Watcher:
    """The runs of a page, and its secret token."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Raise `RunFileError` if a folder is not a run's."""
        self.runs = [Watched(root) for root in roots]
        self.token = secrets.token_urlsafe(24)
        self._shown = lru_cache(maxsize=KEPT)(lambda number: Shown(self.runs[number]))
        self._lock = Lock()  # streams of several pages read in threads

    def parts(self, number: int, *, whole: bool = True) -> dict[str, str]:
        """Return the HTML by part of the page about a run; only the quick ones unless `whole`."""
        with self._lock:
            for run in self.runs:
                run.look()
            standings, run = [run.standing for run in self.runs], self.runs[number]
            empty: dict[str, str] = dict.fromkeys(PARTS, "")
            quick = {
                "runs": SECTIONS.run_list(standings, number),
                "state": SECTIONS.state(run.standing, [*upcoming(run.standing, run.folder)]),
            }
            return empty | quick | (self._shown(number).parts() if whole else {})


def watch_app(watcher: Watcher) -> Starlette:
    """Return the server: the page at `/TOKEN/?run=NUMBER`, and its stream beside it."""

    def number_of(request: Request) -> int | None:
        """Return the number of the run; None without the token or such a run."""
        given, text = request.path_params["token"], request.query_params.get("run", "0")
        right = secrets.compare_digest(given.encode(), watcher.token.encode())
        known = text in map(str, range(len(watcher.runs)))
        return int(text) if right and known else None

    async def show(request: Request) -> Response:
        number = number_of(request)
        if number is None:
            return PlainTextResponse("not found", 404, HEADERS)
        parts = await run_in_threadpool(watcher.parts, number, whole=False)
        nonce, name = secrets.token_urlsafe(16), watcher.runs[number].standing.name
        template = page.PAGES.get_template("watch.html.j2")
        html = template.render(parts=parts, nonce=nonce, number=number, name=name)
        policy = {"Content-Security-Policy": POLICY.format(nonce=nonce)}
        return HTMLResponse(html.encode("utf-8", "replace"), 200, HEADERS | policy)

    async def stream(request: Request) -> Response:
        number = number_of(request)
        if number is None:
            return PlainTextResponse("not found", 404, HEADERS)
        changes = _changes(watcher, number)
        return StreamingResponse(changes, 200, HEADERS, media_type="text/event-stream")

    return Starlette(
        routes=[Route("/{token}/", show), Route("/{token}/events", stream)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)],
    )


async def _changes(watcher: Watcher, number: int) -> AsyncIterator[str]:
    """Yield the changed parts of a page as server-sent events, as often as `SHARE` permits."""
    sent: dict[str, str] = {}
    spoke = 0.0
    while True:
        began = time.monotonic()
        parts = await run_in_threadpool(watcher.parts, number)
        changed = {part: html for part, html in parts.items() if sent.get(part) != html}
        spent = time.monotonic() - began
        if changed or began - spoke > ALIVE:
            sent, spoke = parts, began
            yield f"data: {json.dumps(changed)}\n\n"
        await asyncio.sleep(min(LONGEST_PAUSE, max(POLL, spent / SHARE)))
