"""The command line without its packages: one line that installs them."""

from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dynlora.__main__ import PACKAGES, main


def of_the_extra():
    """Return the distributions that `dynlora[cli]` adds."""
    found = map(Requirement, requires("dynlora"))
    return {
        canonicalize_name(each.name)
        for each in found
        if each.marker and each.marker.evaluate({"extra": "cli"})
    }


def test_the_command_line_looks_for_the_packages_of_its_extra() -> None:
    distributions = packages_distributions()
    named = {canonicalize_name(distributions[name][0]) for name in PACKAGES}
    assert named == of_the_extra()


def test_a_missing_package_ends_in_one_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dynlora.__main__.find_spec", lambda name: None if name == "trl" else name)
    assert main() == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "error: the command line needs trl: pip install 'dynlora[cli]'\n"
