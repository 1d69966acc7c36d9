from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from goldens import GOLDENS
from SAMAdaptLib import store
from SAMAdaptLib.errors import DeviceError, JobError, WeightsError
from SAMAdaptLib.verify import VERIFIERS, verify
from SAMAdaptLib.verify.golden_sets import find_sets


@pytest.fixture
def medsam(tmp_path: Path) -> Path:
    """A copy of the smallest set, to be spoiled."""
    return Path(shutil.copytree(GOLDENS / "medsam", tmp_path / "medsam"))


def edit_arrays(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    with np.load(folder / "model_io.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    edit(arrays)
    np.savez(folder / "model_io.npz", **arrays)


def edit_facts(file: Path, edit: Callable[[dict], None]) -> None:
    facts = json.loads(file.read_text())
    edit(facts)
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        (
            "sam",
            {"image_embedding", "pt3_box_mask_multi/mask_logits_fullres", "batch_boxes/iou", "resized_uint8"},
        ),
        ("medsam", {"network_input", "seg", "seg_boxes3", "low_res_logits_batch2", "prob_fullres"}),
        ("ma_sam", {"low_res_logits", "pred_labels", "enc/block3", "dec/dec_tokens", "prediction_xyz"}),
        ("ma_sam_bbox", {"low_res_logits", "pred_labels", "iou_predictions"}),
    ],
)
def test_the_official_numbers_are_reached(name: str, outputs: set[str]) -> None:
    rows = verify(GOLDENS / name)
    assert {row.output: row.difference for row in rows if not row.passed} == {}
    assert outputs <= {row.output for row in rows}
    assert {row.set for row in rows} == {name}
    assert {row.tolerance for row in rows} <= {0.0, 1e-4}


def test_the_json_of_a_set_is_taken_too() -> None:
    assert verify(GOLDENS / "medsam" / "config.json") == verify(GOLDENS / "medsam")


def test_a_difference_above_the_tolerance_fails_and_is_told(medsam: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["low_res_logits"][0, 0, 3, 4] += 2e-4
        arrays["seg"][7, 8] ^= 1
        arrays["image_embedding"] = arrays["image_embedding"][:, :5]

    edit_arrays(medsam, spoil)
    failed = {row.output: row for row in verify(medsam) if not row.passed}
    assert set(failed) == {"low_res_logits", "seg", "image_embedding"}
    assert failed["low_res_logits"].difference == pytest.approx(2e-4, abs=1e-5)
    assert (failed["seg"].difference, failed["seg"].tolerance) == (1.0, 0.0)
    assert failed["image_embedding"].difference == float("inf")


def test_nan_never_passes(medsam: Path) -> None:
    edit_arrays(medsam, lambda arrays: arrays["prob_fullres"].fill(np.nan))
    assert [row.output for row in verify(medsam) if not row.passed] == ["prob_fullres"]


def test_the_tolerance_is_the_one_that_the_set_states(medsam: Path) -> None:
    edit_facts(
        medsam / "config.json", lambda facts: facts.update(tolerance_hint="Suggested: atol 1e-9 on logits")
    )
    rows = verify(medsam)
    assert {row.tolerance for row in rows} == {0.0, 1e-9}
    assert not all(row.passed for row in rows)


def test_a_folder_may_hold_several_sets_and_one_that_cannot_run_hides_no_other(tmp_path: Path) -> None:
    for name, source in (("first", "medsam"), ("second", "medsam")):
        for suffix, file in (
            (".json", "config.json"),
            (".npz", "model_io.npz"),
            (".safetensors", "checkpoint.safetensors"),
        ):
            shutil.copy(GOLDENS / source / file, tmp_path / f"{name}{suffix}")
    edit_facts(tmp_path / "second.json", lambda facts: facts.update(model="other_sam"))
    (tmp_path / "key_names.json").write_text("{}")
    rows = verify(tmp_path)
    assert {row.set for row in rows} == {"first", "second"}
    assert all(row.passed for row in rows if row.set == "first")
    (failed,) = (row for row in rows if row.set == "second")
    assert not failed.passed
    assert "'other_sam', which SAMAdapt cannot build yet" in failed.output
    assert len(verify(tmp_path / "first")) == len(rows) - 1, "the name without .json is enough"


def test_an_unknown_architecture_is_an_error_that_names_the_known(medsam: Path) -> None:
    edit_facts(medsam / "config.json", lambda facts: facts.update(model="other_sam"))
    with pytest.raises(JobError, match=r"A set of .*ma_sam_bbox.* was wanted, but medsam is of 'other_sam'"):
        verify(medsam)


@pytest.mark.parametrize("architecture", ["mobile_sam", "lite_medsam"])
def test_a_published_checkpoint_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    published = {"package": "some-package==1", "member": "folder/some.pt", "sha256": "ab" * 32}
    facts = {"model": architecture, "published_checkpoint": published}
    (tmp_path / "x.json").write_text(json.dumps(facts))
    np.savez(tmp_path / "x.npz", image_uint8_0=np.zeros((256, 256), np.uint8))
    asked: list[str] = []
    monkeypatch.setattr(store, "find", asked.append)
    with pytest.raises(
        WeightsError, match=r"needs the published checkpoint some\.pt of some-package==1.*--checkpoint"
    ):
        verify(tmp_path / "x.json")
    assert asked == ["ab" * 32]
    with pytest.raises(WeightsError, match="should have the SHA-256 abab"):
        verify(tmp_path / "x.json", GOLDENS / "sam" / "checkpoint.safetensors")


def test_damaged_sets_are_said_to_be_so(medsam: Path, tmp_path: Path) -> None:
    edit_facts(medsam / "config.json", lambda facts: facts["config"].pop("num_heads"))
    with pytest.raises(JobError, match="medsam should hold 'num_heads', but does not"):
        verify(medsam)
    shutil.copy(GOLDENS / "medsam" / "config.json", medsam / "config.json")
    edit_arrays(medsam, lambda arrays: arrays.pop("box_original_xyxy"))
    with pytest.raises(JobError, match="should hold 'box_original_xyxy'"):
        verify(medsam)
    (medsam / "model_io.npz").write_bytes((medsam / "model_io.npz").read_bytes()[:5000])
    with pytest.raises(JobError, match=r"model_io\.npz, but it is missing or damaged"):
        verify(medsam)
    (medsam / "model_io.npz").unlink()
    with pytest.raises(JobError, match="holds none"):
        verify(medsam)
    (medsam / "config.json").write_text("{")
    with pytest.raises(JobError, match=r"config\.json should be the JSON of a golden set"):
        verify(medsam)
    (medsam / "config.json").write_text("[]")
    with pytest.raises(JobError, match="is another JSON"):
        verify(medsam)
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match="should hold a golden set"):
        verify(tmp_path / "empty")
    with pytest.raises(JobError, match="nowhere is not there"):
        verify(tmp_path / "nowhere")


def test_objects_in_arrays_are_never_unpickled(medsam: Path) -> None:
    np.savez(medsam / "model_io.npz", image_uint8_hw=np.array([{}], dtype=object))
    with pytest.raises(JobError, match="missing or damaged"):
        verify(medsam)


def test_the_architectures_of_the_spine_are_there() -> None:
    assert {"sam", "medsam", "ma_sam", "ma_sam_bbox", "mobile_sam", "lite_medsam"} <= set(VERIFIERS)


@pytest.mark.parametrize("name", ["sam", "medsam", "hq_sam", "ma_sam", "ma_sam_bbox", "med_sa_3d"])
def test_every_tensor_of_a_set_goes_to_the_device_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's device without values stands for a GPU: what is left on the processor meets it and raises."""
    kept = torch.Tensor.cpu

    def brought_back(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, device="cpu") if tensor.is_meta else kept(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", brought_back)
    found = find_sets(GOLDENS / name)[0]
    with torch.device("meta"):
        names = [output for output, _ in VERIFIERS[found.architecture](found, None)]
    assert len(names) > 5


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="'cuda:99' was wanted"):
        verify(GOLDENS / "sam", device="cuda:99")
