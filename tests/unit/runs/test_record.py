"""`run.json`, and the version of dynlora with the commit, from checkouts made here."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from dynlora.runs.record import RunRecord, release, versions
from tests.processes import run_in_group

NUMBER = version("dynlora")


def test_each_update_is_on_disk_at_once_beside_what_was_known(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run.json")
    for status in ("running", "finished"):
        record.update(status=status, **({"seed": 3} if status == "running" else {}))
        values = json.loads((tmp_path / "run.json").read_text())
        assert datetime.fromisoformat(values.pop("written")).tzinfo is UTC
        assert (values.pop("format"), values.pop("dynlora")) == (1, NUMBER)
        assert values == {"status": status, "seed": 3}


def test_versions_are_those_of_the_installed_packages() -> None:
    expected = {"python": platform.python_version(), "dynlora": release()}
    expected |= {package: version(package) for package in ("peft", "torch")}
    assert expected.items() <= versions().items()


def git(folder, *words):
    done = run_in_group(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_checkout_of_its_own_names_the_commit_and_uncommitted_changes(tmp_path, monkeypatch):
    package = tmp_path / "src" / "dynlora"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    git(tmp_path, "init", "-q")
    assert release(package) == NUMBER, "without a commit"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "First")
    git(tmp_path, "tag", "v9")
    named = f"{NUMBER}+g{git(tmp_path, 'rev-parse', '--short=12', 'HEAD')}"
    (tmp_path / "record.json").write_text("{}")  # outside the package
    assert release(package) == named
    for name in ("a.py", "new.py"):
        (package / name).write_text("1")
        assert release(package) == f"{named}.dirty"
        (package / name).write_text("")
    (package / "new.py").unlink()
    assert release(package) == named
    installed = tmp_path / ".venv" / "site-packages" / "dynlora"
    installed.mkdir(parents=True)
    for folder in (installed, tmp_path / "nowhere"):
        assert release(folder) == NUMBER
    monkeypatch.setenv("PATH", "")
    assert release(package) == NUMBER, "without git"
