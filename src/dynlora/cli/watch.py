"""`dynlora watch RUN...`: serve a page on this machine that follows runs until Ctrl-C."""

import signal
import socket
import webbrowser
from typing import Any

import click

from dynlora.cli.arguments import RUNS, Verb, flag, option
from dynlora.cli.output import Output
from dynlora.errors import ConfigError
from dynlora.train.signals import Stopped

ADDRESS = "127.0.0.1"  # not reachable from other machines
SECONDS = 1  # for open connections at the end


def _run(given: Any, output: Output) -> None:
    import uvicorn
    from rich.text import Text

    from dynlora.report.watch import Watcher, watch_app

    watcher = Watcher(given.runs)
    try:
        place = socket.create_server((ADDRESS, given.port))
    except OSError as error:
        raise ConfigError(
            f"`--port` must be free, but got {given.port} ({error.strerror}). Choose another."
        ) from error
    with place:
        url = f"http://{ADDRESS}:{place.getsockname()[1]}/{watcher.token}/"
        output.show(Text(url), {"url": url, "runs": [*map(str, given.runs)]})
        output.progress.print("Ctrl-C ends the page, but no run.")
        if given.open:
            webbrowser.open(url)
        quiet: Any = {"access_log": False, "log_level": "error", "server_header": False}
        config = uvicorn.Config(watch_app(watcher), timeout_graceful_shutdown=SECONDS, **quiet)
        number: int = signal.SIGINT
        try:
            uvicorn.Server(config).run(sockets=[place])  # ends by a signal, which it may swallow
        except KeyboardInterrupt as stop:
            number = getattr(stop, "signum", number)
        raise Stopped("the page has ended, but no run", number)


COMMAND = Verb(
    "watch",
    "a page on this machine that follows runs while they train",
    _run,
    [
        RUNS,
        option(
            "--port N",
            "Port of the page (default: a free one).",
            click.IntRange(0, 65535),
            default=0,
        ),
        flag("--open", "Open the page in the browser."),
    ],
)
