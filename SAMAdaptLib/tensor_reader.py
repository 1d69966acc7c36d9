"""Tensors out of PyTorch files that hold more than tensors; nothing of such a file is ever run.

Training scripts of SAM-Med2D and SAM-UNet pickle their whole optimizer beside the weights, which
`torch.load(weights_only=True)` refuses. Here a pickle can only build the inert objects of this module: of a
tensor the numbers that describe it, of an optimizer nothing at all. Every other global ends the reading. Only
the tensors that are wanted are then taken from the file, so that an optimizer's moments cost no memory.

Formats: the zip archive of PyTorch 1.6 and later, and the stream of pickles before it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import WeightsError

_LEGACY_HEADER = [0x1950A86A20F9469CFC6C, 1001]
"""Magic number and version that PyTorch writes first."""
_COUNT_BYTES = 8
"""Before each storage of a legacy file stands its number of elements."""


class _Inert:
    """Base of everything that a pickle may build: attributes that it wants to set are dropped.

    Without `__slots__` and `__setstate__` a file could set attributes of instances, and even of the classes.
    """

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Take and forget."""


class _Optimizer(_Inert):
    """Stands for an optimizer."""

    __slots__ = ()

    def __new__(cls, *_: object) -> _Optimizer:
        return super().__new__(cls)


class _Dict(_Inert, dict[Any, Any]):
    """Stands for `dict` and `OrderedDict`."""

    __slots__ = ()


class _DefaultDict(_Dict):
    """Stands for `defaultdict`; its factory is dropped."""

    __slots__ = ()

    def __init__(self, *_: object) -> None:
        super().__init__()


class _TensorFacts(_Inert):
    """Stands for a tensor: where its numbers lie, not the numbers."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _Parameter(_Inert):
    """Stands for the wrapper around a tensor that is trained."""

    __slots__ = ()

    def __new__(cls, tensor: object, *_: object) -> Any:
        return tensor


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file: its name there, their type and how many they are."""

    key: str
    dtype: torch.dtype
    count: int

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.count * self.dtype.itemsize


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("collections", "defaultdict"): _DefaultDict,
    ("builtins", "dict"): _Dict,
    ("__builtin__", "dict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _TensorFacts,
    ("torch._utils", "_rebuild_tensor_v2"): _TensorFacts,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{(f"torch.optim.{name.lower()}", name): _Optimizer for name in _OPTIMIZERS},
}
"""The globals that a file may name, and what it gets instead; no other is looked up."""


class _TensorUnpickler(pickle.Unpickler):
    """Builds inert objects only."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._name = name
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        """Exchange an allowed global for what stands for it.

        Raises:
            WeightsError: Any other global.
        """
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise WeightsError(
            f"{self._name} should hold tensors only, but asks to run {module}.{name}, which could be "
            "anything, so it was not opened. Ask for the weights as safetensors or as a plain state dict."
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        """Note which storage is meant."""
        kind, dtype, key, _, count, *view = pid
        plain = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(count, int) and count >= 0
        if not plain or view not in ([], [None]):
            raise pickle.UnpicklingError("not a storage")
        self.storages[key] = _Storage(str(key), dtype, count)
        return self.storages[key]


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the tensors of a PyTorch file.

    Args:
        path: The file.

    Returns:
        The content with its nested mappings as plain dicts, holding tensors on the CPU and mappings only;
        optimizers, numbers, lists and whatever else a script stored are left out. Empty if the content is no
        mapping.

    Raises:
        WeightsError: Damaged, or it names a global that is not allowed; the message says which.
    """
    file = Path(path)
    try:
        if zipfile.is_zipfile(file):
            return _read_archive(file)
        return _read_legacy(file)
    except WeightsError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise WeightsError(
            f"{file.name} should be a checkpoint (PyTorch), but is cut short, damaged or something else. "
            "Fetch it again."
        ) from error


def _read_archive(file: Path) -> dict[str, Any]:
    with zipfile.ZipFile(file) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = pickled.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and _stored(archive, order) != b"little":
            raise ValueError("numbers of another byte order")
        content = _TensorUnpickler(io.BytesIO(_stored(archive, pickled)), file.name).load()
        return _Tensors(lambda storage: _stored(archive, f"{folder}data/{storage.key}")).mapping(content)


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member; PyTorch compresses none, and what was compressed could grow without limit."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("a compressed member")
    return archive.read(name)


def _read_legacy(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header = [_TensorUnpickler(stream, file.name).load() for _ in range(3)]
        if header[:2] != _LEGACY_HEADER or not header[2]["little_endian"]:
            raise ValueError("not a file of PyTorch")
        unpickler = _TensorUnpickler(stream, file.name)
        content = unpickler.load()
        starts = {}
        for key in _TensorUnpickler(stream, file.name).load():
            stream.seek(_COUNT_BYTES, os.SEEK_CUR)
            starts[key] = stream.tell()
            stream.seek(unpickler.storages[key].bytes, os.SEEK_CUR)

        def values(storage: _Storage) -> bytes:
            stream.seek(starts[storage.key])
            return stream.read(storage.bytes)

        return _Tensors(values).mapping(content)


class _Tensors:
    """Turns what an unpickler built into tensors.

    Args:
        read: From a storage to its bytes.
    """

    def __init__(self, read: Callable[[_Storage], bytes]) -> None:
        self._read = read
        self._runs: dict[_Storage, Tensor] = {}
        self._mappings: dict[int, dict[str, Any]] = {}

    def mapping(self, content: object) -> dict[str, Any]:
        """Keep tensors and mappings; a mapping that appears twice is built once."""
        if not isinstance(content, dict):
            return {}
        if id(content) not in self._mappings:
            kept: dict[str, Any] = {}
            self._mappings[id(content)] = kept
            for name, value in content.items():
                if isinstance(value, _TensorFacts):
                    kept[str(name)] = self._tensor(value)
                elif isinstance(value, dict):
                    kept[str(name)] = self.mapping(value)
        return self._mappings[id(content)]

    def _tensor(self, facts: _TensorFacts) -> Tensor:
        if not isinstance(facts.storage, _Storage):
            raise TypeError("a tensor without numbers")
        run = self._run(facts.storage)
        if math.prod(facts.size) > len(run):
            raise ValueError("a tensor larger than its numbers")
        return run.as_strided(facts.size, facts.stride, facts.offset)

    def _run(self, storage: _Storage) -> Tensor:
        if storage not in self._runs:
            values = self._read(storage)
            if len(values) != storage.bytes:
                raise ValueError("a storage of another length")
            run = torch.frombuffer(bytearray(values), dtype=storage.dtype) if values else torch.empty(0)
            self._runs[storage] = run
        return self._runs[storage]
