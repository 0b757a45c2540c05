"""Adapters from anywhere, `adapter_config.json` and weights: read, or refused by name."""

import json
import warnings
from pathlib import Path

import pytest
from peft.utils.warning import PeftWarning

from tests.adapters import save_adapter
from tests.fuzz.conftest import Limit
from tests.fuzz.limited_process import LimitedProcess
from tests.fuzz.mutations import mutated_json, mutated_safetensors
from tests.fuzz.promise import CASES, check_cases
from tests.fuzz.reading import use_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good adapter of few layers, with patterns, a bias and a head of its own."""
    place = tmp_path_factory.mktemp("adapter")
    patterns = {"rank_pattern": {"head": 2}, "alpha_pattern": {"conv2": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # peft 0.21 takes a bias for a sharded factor
        save_adapter(place, "bias", use_rslora=True, modules_to_save=["conv1"], **patterns)
    return place


@pytest.fixture(scope="module")
def process(limited: Limit, folder: Path) -> LimitedProcess:
    return limited(use_adapter, (str(folder),))


def promise(process: LimitedProcess, folder: Path, name: str):
    """Return a check that an adapter with one file changed is used, or refused by its folder."""
    path = folder / name
    good = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            said = process.read(str(folder))
        finally:
            path.write_bytes(good)
        assert all(str(folder) in error for error in said), said

    return check


@pytest.mark.parametrize("cases", CASES)
def test_a_changed_configuration_is_read_or_refused(
    process: LimitedProcess, folder: Path, cases: int
) -> None:
    written = json.loads((folder / CONFIG).read_bytes())
    valid = {key: value for key, value in written.items() if value is not None}
    check_cases(cases, mutated_json(valid), promise(process, folder, CONFIG))


@pytest.mark.parametrize("cases", CASES)
def test_changed_weights_are_read_or_refused(
    process: LimitedProcess, folder: Path, cases: int
) -> None:
    valid = (folder / WEIGHTS).read_bytes()
    check_cases(cases, mutated_safetensors(valid), promise(process, folder, WEIGHTS))
