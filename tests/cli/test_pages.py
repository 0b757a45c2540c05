"""Pages in a browser: reports of all methods, and `dynlora watch` beside a run that is killed."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

from dynlora.cli.main import main
from dynlora.importance.agreement import AgreementTest
from dynlora.report.watch import (
    LOG_LINES,
    MOST_LAYERS,
    POLICY,
    SHOWN,
    Watched,
    Watcher,
    upcoming,
    watch_app,
)
from dynlora.runs.folder import RunFolder
from dynlora.train.callbacks import ProgressBar
from tests.cli.finished import read_lines
from tests.jobs import missing
from tests.processes import process_group, run_in_fork
from tests.unit.events import make_event
from tests.unit.report.pages import parse_page
from tests.unit.report.runs import block_names, make_events, run_values, write_run

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
WIDTHS = (390, 768, 1280)
EVIL = "</script><script>alert(1)</script><img src=x onerror=y>"
RUNNING = run_values(status="running", metrics_after=None, steps=None)
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth;
  const found = [];
  if (document.scrollingElement.scrollWidth > width) found.push("the page scrolls sideways");
  for (const each of document.body.querySelectorAll("*")) {
    const box = each.getBoundingClientRect(), frame = each.closest(".scroll, svg");
    if (!frame && box.right > width + 1) found.push(each.outerHTML.slice(0, 80));
    const svg = each.tagName === "text" && each.closest("svg").getBoundingClientRect();
    if (svg && (box.left < svg.left - 1 || box.right > svg.right + 1)) found.push(each.textContent);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    """Return a Chromium: that of the system, or that of Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"needs Chromium, for example by `playwright install`: {error}")
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """Return a new page whose console must stay empty, and which may only load from here."""
    errors, requests = [], []
    with browser.new_page() as opened:
        opened.set_default_timeout(120_000)  # milliseconds, on a busy machine
        opened.on("console", lambda told: errors.append(told.text))
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.on("request", lambda request: requests.append(urlsplit(request.url)))
        yield opened
        assert errors == []
        assert {(place.scheme, place.hostname) for place in requests} <= {
            ("file", None), ("file", ""), ("data", None), ("http", "127.0.0.1"),
        }  # fmt: skip


def check_page(page):
    """Check a page at each width and in each theme: nothing cut off, no finding of axe-core."""
    from axe_playwright_python.sync_playwright import Axe

    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate(CUT_OFF) == [], (width, theme)
        found = Axe().run(page).response["violations"]
        worst = [each for each in found if each["impact"] in ("serious", "critical")]
        assert [(each["id"], each["nodes"][0]["html"]) for each in worst] == [], theme


@pytest.mark.parametrize("method", ["dynamic", "lora", "adalora", "full"])
def test_a_report_is_readable_on_every_screen(finished_by, tmp_path, page, method):
    path = tmp_path / "page.html"
    assert main(["report", str(finished_by(method)), "--output", str(path), "--quiet"]) == 0
    page.goto(path.as_uri())
    for each in page.locator("summary").all():
        each.click()
    check_page(page)


def test_a_comparison_is_readable_on_every_screen(finished_by, tmp_path, page):
    runs = [finished_by(method) for method in ("dynamic", "lora", "full")]
    names = block_names(12)
    for number in range(5):
        folder, events = tmp_path / f"{'long-' * 20}{number}", make_events(names, [9, 50])
        runs += [write_run(folder, events=events, run=RUNNING | {"seed": number})]
    path = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(path), "--quiet"]) == 0
    page.goto(path.as_uri())
    for each in page.locator("summary").all():
        each.click()
    for heading in ("Runs", "Loss and metrics", "Ranks while training", "Paired differences"):
        assert page.get_by_role("heading", name=heading, exact=True).count() == 1
    check_page(page)
    # Each region that scrolls is reached by the keyboard.
    page.set_viewport_size({"width": 390, "height": 900})
    for region in page.locator(".scroll").all():
        region.focus()
        assert region.evaluate("each => each === document.activeElement")


@contextmanager
def watching(*runs):
    """Watch runs with `dynlora watch`, and yield the process and the address of the page."""
    command = [sys.executable, "-m", "dynlora", "watch", *map(str, runs), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with process_group(command, **pipes) as process:
        yield process, json.loads(process.stdout.readline())["url"]


def seen_by(output):
    """Return the file that tells a run to be killed."""
    return output.with_name("seen")


def train_slowly(job, output, dies_at, *options):
    """Train with a pause after each step, and be killed after one of them, once it was seen."""
    usual = ProgressBar.on_step_end

    def pause(self, args, state, *more, **named):
        usual(self, args, state, *more, **named)
        time.sleep(0.3)
        if state.global_step == dies_at:
            while not seen_by(output).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", pause)
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        return main(["train", str(job), "--output", str(output), "--quiet", *options])


@pytest.mark.timeout(600)
def test_a_page_follows_a_run_that_is_killed_and_resumed(page, job, output):
    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(run_in_fork, train_slowly, job, output, 10)
        while not (output / "config.yaml").exists():
            assert not killed.done(), killed.result().stderr
            time.sleep(0.05)
        with watching(output) as (_, url):
            page.goto(url)
            page.evaluate("window.kept = true")
            page.wait_for_selector(".status.running")
            page.wait_for_selector("#state li:has-text('Last step: step 12, in about')")
            page.wait_for_selector("#ranks svg")
            seen_by(output).touch()
            assert killed.result().returncode == -signal.SIGKILL
            page.wait_for_selector(".status.killed")
            page.wait_for_selector("#state li:has-text('--training.resume latest')")
            check_page(page)
            page.locator("summary").first.click()
            ended = pool.submit(
                run_in_fork, train_slowly, job, output, 0, "--training.resume=latest"
            )
            page.wait_for_selector(".status.finished")
            assert ended.result().returncode == 0, ended.result().stderr
            assert page.evaluate("window.kept"), "the page was not loaded again"
            assert page.locator("details").first.get_attribute("open") is not None
            last = read_lines(output / "ranks.jsonl")[-1]
            page.wait_for_selector("#log:has-text('step 12: ')")
            for name, layer in last["layers"].items():
                title = f'#ranks [title^="{name}: rank {layer["rank_after"]}"]'
                assert page.locator(title).count() == 1
            check_page(page)


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run that goes on."""
    root = tmp_path / "run"
    with RunFolder(root).held():
        yield write_run(root, events=make_events(block_names(2), [10, 20]), run=RUNNING)


def parts_of(watcher):
    """Return the HTML by part about the first run."""
    watcher.look(0)
    return watcher.parts(0)


@contextmanager
def answered(url, path, **headers):
    """Yield the answer to a request."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    with closing(connection):
        connection.request("GET", path, headers=headers)
        yield connection.getresponse()


def ask(url, path="", **headers):
    """Return the status, the headers and the text of an answer."""
    with answered(url, path or urlsplit(url).path, **headers) as answer:
        return answer.status, answer.headers, answer.read().decode()


def test_only_the_address_with_the_token_is_answered_and_only_on_this_machine(run):
    with watching(run) as (process, url):
        place = urlsplit(url)
        assert place.hostname == "127.0.0.1"
        status, headers, html = ask(url)
        assert status == 200
        (nonce,) = [script["nonce"] for script in parse_page(html).named("script")]
        assert headers["Content-Security-Policy"] == POLICY.format(nonce=nonce)
        assert headers["Referrer-Policy"] == "no-referrer"
        for path in ("/", "/events/", "/wrong/", "/wrong/events", f"{place.path}run.json",
                     f"{place.path}?run=1", f"{place.path}?run=-1", f"{place.path}../run.json",
                     f"/{'%C3%A9' * 8}/"):  # fmt: skip
            assert ask(url, path)[0] == 404, path
        assert ask(url, Host="evil.example")[0] == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert process.stderr.read().endswith("\ninterrupted: the page has ended, but no run\n")


def test_the_stream_sends_all_parts_first_and_then_those_that_changed(run):
    with watching(run) as (_, url), answered(url, f"{urlsplit(url).path}events") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")

        def received():
            line = answer.readline().decode()
            assert answer.readline() == b"\n"
            return json.loads(line.removeprefix("data: "))

        first = received()
        assert {name for name, html in first.items() if html} == {
            "state", "curves", "ranks", "log", "settings",
        }  # fmt: skip
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 110, "loss": 0.25}\n{"step": 120, "lo')
        second = received()
        assert set(second) == {"state", "curves", "log"}
        assert second["log"].count("step 110: loss 0.25") == 1
        assert "step 120" not in second["log"], "the line is not complete"


def test_the_stream_ends_when_its_page_is_closed(run):
    watcher, seen = Watcher([run]), asyncio.Event()

    async def receive():
        await seen.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message.get("body"):
            seen.set()

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.3"},  # of uvicorn
        "method": "GET",
        "path": f"/{watcher.token}/events",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    ended = asyncio.wait_for(watch_app(watcher)(scope, receive, send), 60)
    with ThreadPoolExecutor(1) as pool:  # the browser has this thread's event loop
        pool.submit(asyncio.run, ended).result()


def test_of_thousands_of_layers_those_that_moved_most_are_shown(tmp_path, page):
    start = dict.fromkeys(block_names(1000), 8)
    one_more = dict.fromkeys(start, 9)
    few = dict.fromkeys([*start][: 5 * SHOWN : 5], 12)
    events = [make_event(10, start, one_more), make_event(20, one_more, one_more | few)]
    assert len(start) > MOST_LAYERS
    with watching(write_run(tmp_path / "run", events=events, run=RUNNING)) as (_, url):
        page.goto(url)
        page.wait_for_selector("#ranks svg")
        titles = page.locator("#ranks [title]").evaluate_all("all => all.map((a) => a.title)")
        assert titles == [f"{name}: rank 12, 8 at the start" for name in few]
        assert page.locator("#ranks svg g").count() == SHOWN
        told = page.locator("#ranks").inner_text()
        assert told.count(f"Of 3,001 layers, these are the {SHOWN} whose ranks moved most") == 2
        assert "Ranks moved at 2 of 2 events" in told
        ups = page.locator("#ranks tbody tr td:nth-child(6)").all_inner_texts()
        assert ups[:2] == ["3001", str(SHOWN)], "the table of events counts all layers"
        check_page(page)


def test_no_text_of_a_run_becomes_markup(tmp_path):
    names = [f"m.layers.0.{EVIL}", "m.layers.0.q"]
    values = RUNNING | {"status": "failed", "error": EVIL, "method": EVIL, "planned_steps": 200}
    metrics = [{"step": 1, EVIL: EVIL, "loss": 0.5}]
    root = write_run(tmp_path / EVIL.replace("/", ""), events=make_events(names, [1]), run=values,
                     metrics=metrics)  # fmt: skip
    for html in parts_of(Watcher([root, root])).values():
        assert not {"script", "img"} & {tag for tag, _ in parse_page(html).tags}
    seen = parse_page("".join(parts_of(Watcher([root, root])).values()))
    assert seen.text.count(EVIL) > 5


def test_a_run_is_told_with_its_next_steps(tmp_path, monkeypatch):
    values = RUNNING | {"planned_steps": 300, "planned_events": [50, 150], "resumed_from_step": 60}
    training = {"eval": "epoch", "save": "steps", "save_steps": 40, "epochs": 2, "max_steps": None}
    root = write_run(tmp_path / "run", run=values, config={"training": training})
    os.utime(root / "run.json", (1000, 1000))
    os.utime(root / "metrics.jsonl", (1080, 1080))  # 40 steps in 80 seconds
    monkeypatch.setattr("dynlora.report.watch.QUIET", float("inf"))
    run = Watched(root, "run")
    run.look()
    text = parse_page(parts_of(Watcher([root]))["state"]).text
    assert "100 of 300 (33%)" in text
    assert [*upcoming(run.standing, run.folder)] == [
        "Next checkpoint: step 120, in about 40 s.",
        "Next event: step 150, in about 100 s.",
        "Next evaluation: step 150, in about 100 s.",
        "Last step: step 300, in about 6 min 40 s.",
    ]


def test_a_running_run_without_its_lock_was_killed_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("dynlora.report.watch.QUIET", -1.0)
    run = write_run(tmp_path, run=RUNNING)
    watched = Watched(run, "run")
    with RunFolder(run).held():
        watched.look()
        assert watched.standing.status == "running"
    watched.look()
    assert watched.standing.status == "killed"
    assert missing(" ".join(upcoming(watched.standing, watched.folder)), "was killed | Start") == []
    (run / "run.json").write_text("{")
    watched.look()
    assert watched.standing.status == "unreadable"
    write_run(run, run=run_values())
    watched.look()
    assert watched.standing.status == "finished"


def test_a_long_log_shows_its_newest_lines_and_a_replaced_file_is_read_again(tmp_path):
    lines = [{"step": n, "loss": 0.5} for n in range(1000)]
    root = write_run(tmp_path / "run", run=RUNNING, metrics=lines)
    watcher = Watcher([root])
    log = parts_of(watcher)["log"]
    assert log.count("loss 0.5") == LOG_LINES
    assert "step 999: loss" in log
    (root / "metrics.jsonl").unlink()
    write_run(root, run=RUNNING, metrics=lines[:5])
    assert parts_of(watcher)["log"].count("loss 0.5") == 5
    metrics = root / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {n}, "loss": 0.75}}\n' for n in range(9)))
    log = parts_of(watcher)["log"]  # of a longer file under the same inode
    assert (log.count("loss 0.75"), log.count("loss 0.5")) == (9, 0)


def test_runs_in_folders_of_one_name_are_listed_by_their_paths(tmp_path):
    roots = [write_run(tmp_path / place / "lora", run=run_values()) for place in ("p", "q")]
    listed = Watcher(roots).parts(0)["runs"]
    assert [str(root) in listed for root in roots] == [True, True]


def test_watching_needs_runs_and_a_free_port(run, tmp_path, refused):
    assert "Missing argument 'RUN...'" in refused("watch")
    assert "a folder without one" in refused("watch", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"`--port` must be free, but got {port}" in refused("watch", run, "--port", port)
