"""The torso phantom: organs of their density where the truth says, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, label

from SAMAdaptLib.dicom import PHANTOM_ORGANS, DicomSeries, read_series, torso_truth, write_torso_phantom
from SAMAdaptLib.dicom.phantom import torso_geometry
from SAMAdaptLib.errors import DicomError
from SAMAdaptLib.geometry import Geometry

DENSITY_HU = {
    "liver": 110,
    "spleen": 120,
    "right kidney": 180,
    "left kidney": 180,
    "aorta": 170,
    "right lung": -850,
    "left lung": -850,
    "stomach": 20,
}
VOLUME_ML = {
    "liver": (800, 1800),
    "spleen": (120, 350),
    "right kidney": (100, 220),
    "left kidney": (100, 220),
}


@pytest.fixture(scope="module")
def torso(tmp_path_factory: pytest.TempPathFactory) -> DicomSeries:
    folder = tmp_path_factory.mktemp("torso")
    write_torso_phantom(folder, shape_kji=(48, 128, 128), spacing_ijk_mm=(3, 3, 5))
    return read_series(folder)


def test_the_series_lies_around_the_middle(torso: DicomSeries) -> None:
    geometry = torso.volume.geometry
    assert geometry.same_grid(torso_geometry((48, 128, 128), (3, 3, 5)), tolerance_mm=1e-6)
    np.testing.assert_allclose(geometry.centre_ras, 0, atol=1e-9)
    assert torso.volume.modality == "CT"
    assert torso.warnings == ()


@pytest.mark.parametrize("organ", PHANTOM_ORGANS, ids=lambda organ: organ.name)
def test_organs_have_their_density_and_size(torso: DicomSeries, organ: object) -> None:
    name = organ.name  # type: ignore[attr-defined]
    mask = torso_truth(torso.volume.geometry) == organ.label_value  # type: ignore[attr-defined]
    inner = binary_erosion(mask)
    assert torso.volume.voxels[inner].mean() == pytest.approx(DENSITY_HU[name], abs=5)
    assert 8 < torso.volume.voxels[inner].std() < 20
    pieces, count = label(mask)
    assert np.bincount(pieces.ravel())[1:].max() > 0.99 * mask.sum(), f"{count} pieces"
    if name in VOLUME_ML:
        low, high = VOLUME_ML[name]
        assert low < mask.sum() * torso.volume.geometry.voxel_volume_mm3 / 1000 < high


def test_organs_lie_on_their_side_of_the_patient(torso: DicomSeries) -> None:
    geometry = torso.volume.geometry
    truth = torso_truth(geometry)
    for organ in PHANTOM_ORGANS:
        k, j, i = np.nonzero(truth == organ.label_value)
        right, anterior, superior = geometry.ijk_to_ras(np.column_stack([i, j, k])).mean(axis=0)
        if organ.name in ("liver", "right kidney", "right lung"):
            assert right > 30
        if organ.name in ("spleen", "left kidney", "left lung", "stomach"):
            assert right < -30
        if "kidney" in organ.name:
            assert anterior < -30
        if "lung" in organ.name:
            assert superior > 60


def test_the_truth_does_not_depend_on_the_grid() -> None:
    """On a flipped, turned or cropped grid every point has the label that it has on the straight one."""
    straight = torso_geometry((24, 64, 64), (6, 6, 10))
    truth = torso_truth(straight)
    affine = straight.affine_ijk_to_ras[:, [1, 2, 0, 3]].copy()
    affine[:3, 3] += 63 * affine[:3, 0]
    affine[:3, 0] *= -1
    turned = torso_truth(Geometry((64, 24, 64), affine))
    np.testing.assert_array_equal(turned, truth[:, ::-1, :].transpose(2, 0, 1))
    box = (slice(5, 20), slice(10, 40), slice(8, 60))
    np.testing.assert_array_equal(torso_truth(straight.cropped(box)), truth[box])


def test_a_seed_is_a_patient(tmp_path: Path) -> None:
    size = {"shape_kji": (12, 64, 64), "spacing_ijk_mm": (6.0, 6.0, 20.0)}
    first, again, other = (
        write_torso_phantom(tmp_path / name, seed, **size)  # type: ignore[arg-type]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    one, two = read_series(tmp_path / "a"), read_series(tmp_path / "c")
    assert one.series_uid != two.series_uid
    truths = [torso_truth(one.volume.geometry, seed) for seed in (1, 2)]
    overlap = np.mean(truths[0][truths[0] > 0] == truths[1][truths[0] > 0])
    assert 0.6 < overlap < 0.97
    assert len(other) == 12


def test_edges_are_mixed_voxels(torso: DicomSeries) -> None:
    """A partial volume: along the edge of the liver some voxels lie between its density and that of fat."""
    truth = torso_truth(torso.volume.geometry) == 1
    edge = truth & ~binary_erosion(truth)
    values = torso.volume.voxels[edge]
    assert 0.05 < np.mean((values > -60) & (values < 60)) < 0.6


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DicomError, match="phantom could not be written"):
        write_torso_phantom(tmp_path / "file" / "inside")
