"""The version with the commit, from checkouts made here."""

from importlib.metadata import version

import pytest

from dynlora.runs.record import release
from tests.processes import run_in_group


def git(folder, *words):
    done = run_in_group(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "src" / "dynlora"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "First")
    return tmp_path


def test_in_a_checkout_of_its_own_the_version_names_the_commit(checkout):
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert release(checkout / "src" / "dynlora") == f"{version('dynlora')}+g{commit}"
    git(checkout, "tag", "v9")
    assert release(checkout / "src" / "dynlora") == f"{version('dynlora')}+g{commit}"


def test_what_was_changed_and_not_committed_is_marked(checkout):
    package = checkout / "src" / "dynlora"
    (checkout / "record.json").write_text("{}")
    assert not release(package).endswith(".dirty")  # that is not the package's
    for name in ("a.py", "new.py"):
        (package / name).write_text("1")
        assert release(package).endswith(".dirty")
        (package / name).write_text("")
    (package / "new.py").unlink()
    assert not release(package).endswith(".dirty")


def test_somebody_elses_checkout_around_an_installed_package_is_not_named(checkout):
    installed = checkout / ".venv" / "site-packages" / "dynlora"
    installed.mkdir(parents=True)
    assert release(installed) == version("dynlora")


def test_without_a_checkout_or_git_it_is_the_version_alone(tmp_path, checkout, monkeypatch):
    assert release(tmp_path / "nowhere") == version("dynlora")
    monkeypatch.setenv("PATH", "")
    assert release(checkout / "src" / "dynlora") == version("dynlora")


def test_a_checkout_without_a_commit_is_the_version_alone(tmp_path):
    package = tmp_path / "src" / "dynlora"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    assert release(package) == version("dynlora")
