from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from goldens import GOLDENS, golden
from SAMAdaptLib.errors import WeightsError
from SAMAdaptLib.files import sha256_of_file
from SAMAdaptLib.weights import load_into, read_checkpoint, recognise

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(2)}


class RunsWhenLoaded:
    """Pickled code: loading it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def network() -> nn.Module:
    module = nn.Module()
    module.a, module.b = nn.Linear(3, 2, bias=False), nn.Linear(2, 2)
    del module.b.weight
    return module


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_both_formats_give_the_same_tensors(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.{suffix}"
    save_file(TENSORS, file) if suffix == "safetensors" else torch.save(TENSORS, file)
    read = read_checkpoint(file, sha256_of_file(file))
    assert read.name == f"x.{suffix}"
    assert read.sha256 == sha256_of_file(file)
    assert set(read.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(read.tensors[name], tensor)


def test_the_old_torch_format_is_read(tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_checkpoint(file).tensors["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, kind: torch.dtype) -> None:
    save_file({name: tensor.to(kind) for name, tensor in TENSORS.items()}, tmp_path / "half.safetensors")
    read = read_checkpoint(tmp_path / "half.safetensors").tensors["a.weight"]
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, TENSORS["a.weight"])


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str) -> None:
    parallel = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    torch.save({wrapper: parallel, "optimizer": {"step": 3}, "epoch": 7}, tmp_path / "t.pth")
    assert set(read_checkpoint(tmp_path / "t.pth").tensors) == set(TENSORS)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, zipped: bool) -> None:
    touched = tmp_path / "touched"
    file = tmp_path / "evil.pth"
    torch.save({"a": RunsWhenLoaded(touched)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"evil.pth should hold tensors only, but asks to run .*system"):
        read_checkpoint(file)
    assert not touched.exists()


def test_a_plain_pickle_is_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(RunsWhenLoaded(touched)))
    with pytest.raises(WeightsError):
        read_checkpoint(tmp_path / "evil.pkl")
    assert not touched.exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_truncated_file_is_said_to_be_damaged(tmp_path: Path, suffix: str, share: float) -> None:
    file = tmp_path / f"cut.{suffix}"
    tensors = {f"t{n}": torch.randn(40, 40) for n in range(8)}
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match=rf"cut\.{suffix} should be a checkpoint.*cut short, damaged"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"<html>Quota exceeded</html>", "damaged or something else"), (b"\x80", "damaged")],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=said):
        read_checkpoint(tmp_path / "x.pth")


def test_a_missing_file_and_a_file_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pth is not there"):
        read_checkpoint(tmp_path / "gone.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="holds none"):
        read_checkpoint(tmp_path / "none.pth")


def test_another_hash_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"should have the SHA-256 0{16}\.\.\., but has"):
        read_checkpoint(tmp_path / "x.safetensors", "0" * 64)


def test_a_checkpoint_that_fits_is_loaded(network: nn.Module) -> None:
    load_into(network, {**TENSORS, "head": torch.zeros(1)}, "N", ignore=("head",))
    torch.testing.assert_close(network.state_dict()["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": TENSORS["a.weight"]}, r"lacks b\.bias;"),
        ({**TENSORS, "c": torch.ones(1)}, r"also holds c;"),
        ({**TENSORS, "b.bias": torch.ones(5)}, r"has another shape at b\.bias \(\[5\] for \[2\]\);"),
        (
            {f"k{n}": torch.ones(1) for n in range(9)},
            r"lacks a\.weight, b\.bias and also holds k0, k1, k2 and 6 more; it looks like no network",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    network: nn.Module, tensors: dict[str, torch.Tensor], said: str
) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"A checkpoint of N was wanted, but the file {said}"):
        load_into(network, tensors, "N")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name])


def test_networks_are_recognised_by_their_keys() -> None:
    assert recognise(golden("sam").tensors(None)) == "SAM or MedSAM"
    assert recognise(golden("ma_sam").tensors(None)) == "a MA-SAM adapter file"
    assert recognise(read_checkpoint(GOLDENS / "ma_sam" / "sam_base.safetensors").tensors) == "SAM or MedSAM"
    for keys, title in {
        ("w_a_000", "mask_decoder.x"): "a SAMed adapter file",
        ("w_a_000", "fati_qa.weight"): "a SAMed_s adapter file",
        (
            "image_encoder.blocks.0.Space_Adapter.D_fc1.weight",
        ): "a Medical SAM Adapter file without its decoder",
        ("image_encoder.blocks.0.Adapter.channel.0.weight", "mask_decoder.x"): "SAM-Med2D",
        ("image_encoder.patch_embed.seq.0.c.weight",): "MobileSAM or LiteMedSAM",
        ("fc.weight",): "no network that SAMAdapt knows",
    }.items():
        assert recognise(dict.fromkeys(keys, torch.zeros(1))) == title
