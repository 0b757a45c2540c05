"""Read and write safetensors files tensor by tensor, so that no file has to fit in memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import _TYPES
from torch import Tensor

WINDOW = 4 * 2**20  # bytes to map before the file is opened again, which releases pages read
NAMES = {dtype: name for name, dtype in _TYPES.items()}  # of the format, by dtype


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file by name, mapped at each access: those in use are in memory."""

    def __init__(self, path: Path, keys: Iterable[str] | None = None) -> None:
        """Open a file; None for `keys` selects all. Raises `SafetensorError` if it is broken."""
        self._path = path
        self._open()
        self._keys = dict.fromkeys(self._file.keys() if keys is None else keys)
        self.metadata: Mapping[str, str] = self._file.metadata() or {}

    def _open(self) -> None:
        self._file: Any = safe_open(self._path, framework="pt")
        self._mapped = 0

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        if self._mapped > WINDOW:
            self._open()
        tensor: Tensor = self._file.get_tensor(key)
        self._mapped += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@contextmanager
def write_tensors(
    path: Path, layout: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file; the yielded function writes one tensor, and they come in any order.

    The file is the same as from `safetensors.torch.save_file`. Each tensor must be written once,
    with the shape and dtype that it has in `layout`, where device `meta` is enough.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name)):
        start, end = end, end + layout[name].nbytes
        header[name] = {
            "dtype": NAMES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        first = file.write(len(text).to_bytes(8, "little") + text)

        def write(name: str, tensor: Tensor) -> None:
            given, planned = ((t.dtype, tuple(t.shape)) for t in (tensor, layout[name]))
            if given != planned:
                raise ValueError(
                    f"{name!r} must be {planned[0]} of shape {planned[1]}, but got {given[0]} of "
                    f"shape {given[1]}. Write the tensors that `layout` announces."
                )
            file.seek(first + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

        yield write
