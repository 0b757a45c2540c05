"""Files of tensors, read and written one by one: safetensors itself is the oracle."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.adapter_files import tensor_file
from dynlora.adapter_files.tensor_file import TensorFile, write_tensors

TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.weight": torch.randn(5, 2).T,  # not contiguous
    "count": torch.tensor(7),
    "häľf": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
}


def test_a_file_written_in_any_order_is_that_of_safetensors(tmp_path):
    layout = {name: tensor.to("meta") for name, tensor in TENSORS.items()}
    with write_tensors(tmp_path / "made", layout, {"format": "pt"}) as write:
        for name, tensor in reversed(TENSORS.items()):
            write(name, tensor)
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(whole, tmp_path / "given", metadata={"format": "pt"})
    assert (tmp_path / "made").read_bytes() == (tmp_path / "given").read_bytes()


def test_a_tensor_unlike_the_layout_is_refused_by_name(tmp_path):
    layout = {name: tensor.to("meta") for name, tensor in TENSORS.items()}
    with write_tensors(tmp_path / "made", layout, {}) as write:
        for tensor in (torch.tensor(7.5), torch.tensor([7])):
            with pytest.raises(ValueError, match=r"'count' must be torch\.int64 of shape \(\)"):
                write("count", tensor)


def test_tensors_are_read_by_name_through_any_number_of_mappings(tmp_path, monkeypatch):
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "given")
    monkeypatch.setattr(tensor_file, "WINDOW", 8)
    expected = load_file(tmp_path / "given")
    file = TensorFile(tmp_path / "given")
    assert len(file) == len(expected)
    for _ in range(2):
        assert all(torch.equal(file[name], tensor) for name, tensor in expected.items())
    some = TensorFile(tmp_path / "given", ["mask"])
    assert list(some) == ["mask"]
    with pytest.raises(KeyError, match="count"):
        some["count"]
