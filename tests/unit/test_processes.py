"""A command or a fork that takes too long leaves no process behind."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.processes import process_group, run_in_fork, run_in_group

PARENT = """
import subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(command, start_new_session=sys.argv[2] == "own session")
open(sys.argv[1], "w").write(f"{child.pid}\\n")
if sys.argv[3] == "waits":
    child.wait()
"""


def is_gone(pid):
    """Wait until a process has ended; return whether it has."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("session", "parent"), [("own session", "waits"), ("same session", "has ended")]
)
def test_a_grandchild_that_sleeps_is_gone_after_the_timeout(tmp_path, session, parent):
    """With a parent that waits for it, and with one that has ended and left it the output."""
    place = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, str(place), session, parent]
    with pytest.raises(subprocess.TimeoutExpired):
        run_in_group(command, timeout=3, capture_output=True)
    assert is_gone(int(place.read_text()))


def test_a_test_that_fails_meanwhile_leaves_no_process():
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(AssertionError, match="meanwhile"), process_group(command) as process:
        raise AssertionError("meanwhile")
    assert is_gone(process.pid)


def wait_for_a_child(place):
    """Write the process ID of a child that sleeps, and wait for it."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as child:
        place.write_text(str(child.pid))
    return 0


def test_a_fork_that_takes_too_long_is_an_error_and_leaves_no_process(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        run_in_fork(wait_for_a_child, tmp_path / "pid", timeout=3)
    assert is_gone(int((tmp_path / "pid").read_text()))
