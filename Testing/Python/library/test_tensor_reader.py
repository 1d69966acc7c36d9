from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from SAMAdaptLib import tensor_reader
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.tensor_reader import read_tensors
from SAMAdaptLib.weights import read_checkpoint

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "stream"])
WHOLE_NUMBERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
OPTIMIZERS = [
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.RAdam,
]


class Payload:
    """Pickled as a call of anything."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def save(content: object, file: Path, zipped: bool) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file


def trained(optimizer: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    stepping = optimizer(network.parameters(), lr=0.1)
    network(torch.randn(4, 3)).square().sum().backward()
    stepping.step()
    return network, stepping


def pickled_global(name: bytes) -> bytes:
    """The pickle of a call of `MODULE NAME` with the argument "x"."""
    return b"\x80\x02c" + name.replace(b" ", b"\n") + b"\n(X\x01\x00\x00\x00xtR."


def archive_of(pickled: bytes, file: Path, members: dict[str, bytes] | None = None, how: int = 0) -> Path:
    with zipfile.ZipFile(file, "w", compression=how) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in (members or {}).items():
            archive.writestr(f"x/{name}", content)
    return file


def pickled_tensor(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4) -> bytes:
    """The pickle of {"t": a tensor over the storage "0"}, as PyTorch writes it but with any numbers."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    class Described:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"t": Described()})
    return stream.getvalue()


@FORMATS
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_weights_beside_a_pickled_optimizer_are_read(
    tmp_path: Path, optimizer: type[torch.optim.Optimizer], zipped: bool
) -> None:
    network, stepping = trained(optimizer)
    file = save({"model": network.state_dict(), "optimizer": stepping}, tmp_path / "x.pth", zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    read = read_checkpoint(file).tensors
    assert list(read) == list(network.state_dict())
    for name, tensor in network.state_dict().items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@FORMATS
def test_every_kind_of_tensor_is_read_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "transposed": base.T,
        "part": base[1:3, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
        **{
            str(kind): torch.tensor([1, 2, 3], dtype=kind) for kind in (torch.int64, torch.int32, torch.uint8)
        },
    }
    read = read_tensors(save(content, tmp_path / "x.pth", zipped))
    assert list(read) == list(content)
    for name, tensor in content.items():
        assert torch.equal(read[name], tensor), name
        assert read[name].dtype == tensor.dtype or name == "empty"
    assert read["transposed"].data_ptr() == read["part"].data_ptr() - 6 * 4  # one storage, read once


@FORMATS
def test_what_is_no_tensor_is_left_out(tmp_path: Path, zipped: bool) -> None:
    content = {"epoch": 3, "best": 0.5, "names": ["a"], "model": {"w": torch.ones(2), "note": "x"}}
    read = read_tensors(save(content, tmp_path / "x.pth", zipped))
    assert list(read) == ["model"]
    assert list(read["model"]) == ["w"]
    assert read_tensors(save([torch.ones(2)], tmp_path / "y.pth", zipped)) == {}


def test_moments_of_the_optimizer_are_not_even_read(tmp_path: Path) -> None:
    network, stepping = trained(torch.optim.Adam)
    whole = save({"model": network.state_dict(), "optimizer": stepping}, tmp_path / "whole.pth", True)
    numbers = {tensor.data_ptr() for tensor in network.state_dict().values()}
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "cut.pth", "w") as new:
        stored = [name for name in old.namelist() if "/data/" in name]
        assert len(stored) > len(numbers)
        for name in old.namelist():
            if name not in stored[len(numbers) :]:
                new.writestr(name, old.read(name))
    read = read_tensors(tmp_path / "cut.pth")["model"]
    assert torch.equal(read["0.weight"], network.state_dict()["0.weight"])


@FORMATS
@pytest.mark.parametrize("place", ["value", "key", "state", "beside"])
def test_code_is_named_and_never_run(tmp_path: Path, zipped: bool, place: str) -> None:
    touched = tmp_path / "touched"
    code = Payload(os.system, f"touch {touched}")
    network, stepping = trained(torch.optim.Adam)
    content: dict[Any, Any] = {"model": network.state_dict(), "optimizer": stepping}
    if place == "value":
        content["model"]["0.weight"] = code
    elif place == "key":
        content = {code: 1, **content}
    elif place == "state":
        stepping.state["x"] = code  # type: ignore[index]
    else:
        content["epoch"] = code
    file = save(content, tmp_path / "evil.pth", zipped)
    for read in (read_tensors, read_checkpoint):
        with pytest.raises(WeightsError, match=r"evil\.pth should hold .*, but asks to run \w+\.system,"):
            read(file)
    assert not touched.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"builtins eval",
        b"builtins getattr",
        b"__builtin__ exec",
        b"copyreg _reconstructor",
        b"functools partial",
        b"operator attrgetter",
        b"torch load",
        b"torch.hub load",
        b"torch.storage _load_from_bytes",
        b"torch._utils _rebuild_wrapper_subclass",
        b"torch.optim.adam adam",
        b"torch.optim.adam Adam.__init__",
        b"torch FloatStorage.__class__",
        b"collections OrderedDict.fromkeys",
        b"SAMAdaptLib.tensor_reader read_tensors",
    ],
)
def test_every_other_global_is_refused_by_name(tmp_path: Path, name: bytes) -> None:
    file = archive_of(pickled_global(name), tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=f"asks to run {name.decode().replace(' ', '.')},"):
        read_tensors(file)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_refused_module_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "runs_on_import.py").write_text(f"open({str(touched)!r}, 'w').close()\nlist = list\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = b"cruns_on_import\nlist\n" if protocol == 2 else b"\x8c\x0eruns_on_import\x8c\x04list\x93"
    file = archive_of(b"\x80" + bytes([protocol]) + named + b")R.", tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"asks to run runs_on_import\.list,"):
        read_tensors(file)
    assert not touched.exists()


@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00xK\x01s", b"N}X\x01\x00\x00\x00xK\x01s\x86"])
def test_a_file_cannot_change_what_stands_for_its_globals(tmp_path: Path, name: str, state: bytes) -> None:
    inert = tensor_reader._ALLOWED["torch._utils", name]
    before = dict(vars(inert))
    pickled = b"\x80\x02ctorch._utils\n" + name.encode() + b"\n" + state + b"b."
    with pytest.raises(WeightsError, match="damaged"):
        read_tensors(archive_of(pickled, tmp_path / "evil.pth"))
    assert dict(vars(inert)) == before


def test_attributes_that_a_file_sets_are_dropped(tmp_path: Path) -> None:
    """State dicts carry an attribute; one called `get` must not stand in for the method."""
    weights = nn.Linear(2, 1).state_dict()
    weights.get = "evil"  # type: ignore[method-assign,assignment]
    content = {"model": weights, "optimizer": trained(torch.optim.SGD)[1]}
    file = tmp_path / "x.pth"
    torch.save(content, file)
    read = read_tensors(file)["model"]
    assert read.get("bias") is not None
    assert set(read) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("size", "stride", "offset", "count"),
    [
        ((2, 3), (3, 1), 0, 4),  # more than there is
        ((2, 2), (4, 1), 0, 4),  # strides lead outside
        ((2,), (1,), 3, 4),  # offset leads outside
        ((2,), (1,), -1, 4),
        ((1 << 40,), (0,), 0, 4),  # four numbers that claim to be a terabyte
        ((4,), (1,), 0, 1 << 40),  # another length than the member's
        ((4,), (1,), 0, -4),
    ],
)
def test_tensors_outside_their_numbers_are_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int, count: int
) -> None:
    pickled = pickled_tensor(size, stride, offset, count)
    file = archive_of(pickled, tmp_path / "x.pth", {"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    with pytest.raises(WeightsError, match=r"x\.pth should be a checkpoint .* damaged"):
        read_tensors(file)


def test_the_same_tensor_with_right_numbers_is_read(tmp_path: Path) -> None:
    members = {"data/0": struct.pack("<4f", 1, 2, 3, 4), "byteorder": b"little"}
    file = archive_of(pickled_tensor((2, 2), (1, 2)), tmp_path / "x.pth", members)
    assert read_tensors(file)["t"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize("wrong", ["compressed", "order", "missing", "two", "pid", "cut"])
def test_damaged_files_are_said_to_be_damaged(tmp_path: Path, wrong: str) -> None:
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    pickled = pickled_tensor((2, 2), (2, 1))
    file = tmp_path / "x.pth"
    members = {"data/0": numbers}
    if wrong == "order":
        members["byteorder"] = b"big"
    elif wrong == "missing":
        members = {}
    elif wrong == "two":
        members["y/data.pkl"] = pickled
    elif wrong == "pid":
        pickled = b"\x80\x02K\x01Q."
    archive_of(pickled, file, members, zipfile.ZIP_DEFLATED if wrong == "compressed" else 0)
    if wrong == "cut":
        file.write_bytes(b"\x80\x02}q")
    with pytest.raises(WeightsError, match=r"x\.pth should be a checkpoint .* damaged"):
        read_tensors(file)


def test_a_mapping_inside_itself_is_read(tmp_path: Path) -> None:
    network, stepping = trained(torch.optim.Adam)
    content: dict[str, Any] = {"optimizer": stepping, **network.state_dict()}
    content["self"] = content
    torch.save(content, tmp_path / "x.pth")
    assert set(read_checkpoint(tmp_path / "x.pth").tensors) == set(network.state_dict())
